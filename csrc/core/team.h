// Threads that stay together for a sequence of parallel loops: opening and closing a parallel region costs more than
// one of a decoding step's loops takes, and a step has a hundred of them.
//
//   lead_team(threads, sequence, context);      calls sequence(context); its parallel_for loops share one region
//
// The calling thread leads: it runs the sequence. The others wait for its loops, spinning for a moment and then giving
// up their time slice to whoever wants it, and are gone when lead_team returns. Which thread runs a task never changes
// the task's result, so a sequence gives the same bits inside a team and outside.
#pragma once

#include <cstdint>

namespace ofakern {

using TeamTask = void (*)(const void* body, std::int64_t task, int thread);

void lead_team(int threads, void (*sequence)(void* context), void* context);

// Whether the calling thread leads a team.
bool leads_team();
// Calls run(body, task, thread) for each task (fewer than 2^31), each on one of the team's threads; returns when all
// are done.
void run_in_team(std::int64_t tasks, TeamTask run, const void* body);

}  // namespace ofakern

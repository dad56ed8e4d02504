#include "core/team.h"

#include <omp.h>
#include <sched.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ofakern {
namespace {

constexpr int kPatience = 4096;  // pauses before a waiting thread offers its time slice: about 0.1 ms

void relax(int* waited) {
  if (++*waited > kPatience) {
    sched_yield();
    return;
  }
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// One line each for what threads fight over, so that they fight over nothing else.
struct Team {
  // The loop's number in the upper half, tasks that nobody has taken in the lower. A thread that comes late to a loop
  // finds another number and takes nothing, so nobody ever waits for a thread that has no task.
  alignas(64) std::uint64_t ticket = 0;
  alignas(64) std::int64_t done = 0;  // tasks of this loop
  alignas(64) std::int64_t tasks = 0;
  TeamTask run = nullptr;
  const void* body = nullptr;
  alignas(64) bool closed = false;
};

constexpr std::uint64_t kLeft = 0xffffffffu;

thread_local Team* led = nullptr;

bool take_task(Team& team, int thread) {
  std::uint64_t ticket = __atomic_load_n(&team.ticket, __ATOMIC_ACQUIRE);
  while ((ticket & kLeft) != 0) {
    if (!__atomic_compare_exchange_n(&team.ticket, &ticket, ticket - 1, true, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE))
      continue;
    // The loop cannot end before this task does: its fields stay as they are.
    team.run(team.body, team.tasks - static_cast<std::int64_t>(ticket & kLeft), thread);
    __atomic_fetch_add(&team.done, 1, __ATOMIC_RELEASE);
    return true;
  }
  return false;
}

void follow(Team& team, int thread) {
  for (int waited = 0; !__atomic_load_n(&team.closed, __ATOMIC_ACQUIRE);) {
    if (take_task(team, thread))
      waited = 0;
    else
      relax(&waited);
  }
}

}  // namespace

bool leads_team() { return led != nullptr; }

void run_in_team(std::int64_t tasks, TeamTask run, const void* body) {
  Team& team = *led;
  team.run = run;
  team.body = body;
  team.tasks = tasks;
  team.done = 0;
  const std::uint64_t loop = (team.ticket | kLeft) + 1;
  __atomic_store_n(&team.ticket, loop | static_cast<std::uint64_t>(tasks), __ATOMIC_RELEASE);
  while (take_task(team, 0)) {
  }
  for (int waited = 0; __atomic_load_n(&team.done, __ATOMIC_ACQUIRE) != tasks;) relax(&waited);
}

void lead_team(int threads, void (*sequence)(void*), void* context) {
  if (threads <= 1 || led != nullptr || omp_in_parallel() != 0) return sequence(context);
  Team team;
#pragma omp parallel num_threads(threads)
  if (omp_get_thread_num() != 0) {
    follow(team, omp_get_thread_num());
  } else {
    led = &team;
    sequence(context);
    led = nullptr;
    __atomic_store_n(&team.closed, true, __ATOMIC_RELEASE);
  }
}

}  // namespace ofakern

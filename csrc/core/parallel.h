// A parallel loop over independent tasks. Which thread runs a task never changes the task's result.
#pragma once

#include <omp.h>

#include "core/team.h"
#include "core/vec.h"

namespace ofakern::OFAKERN_ISA {
namespace {

template <class Body>
OFAKERN_LOCAL void call_body(const void* body, i64 task, int thread) {
  (*static_cast<const Body*>(body))(task, thread);
}

// Calls body(task, thread) for every task. With one thread no parallel region is opened: a process that forks after one
// (a DataLoader worker) would hang in the child's first region. Inside a team (core/team.h) its threads take the tasks.
template <class Body>
OFAKERN_LOCAL void parallel_for(i64 tasks, int threads, const Body& body) {
  if (threads <= 1 || tasks <= 1) {
    for (i64 task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  if (leads_team()) return run_in_team(tasks, &call_body<Body>, &body);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (i64 task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

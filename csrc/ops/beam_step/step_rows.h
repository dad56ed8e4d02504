// What both ops do with a row before they choose: its log-sum and the maximum of every chunk, or the list of what may
// follow.
#pragma once

#include "core/parallel.h"
#include "core/with_type.h"
#include "ops/beam_step/step_rules.h"
#include "ops/beam_step/step_softmax.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// A row is summed in pieces of this many logits, the unit of work: which thread sums one changes no bit.
constexpr i64 kPiece = 64 * kChunk;

// One call: its sizes, and the workspace that outlives a row.
struct StepPlan {
  const StepInputs* in;
  i64 rows, vocabulary, pieces, chunks;
  i64 longest;           // most tokens that a list holds
  ExpSum* sums;          // [rows, pieces]; of rows whose softmax is over the vocabulary
  float* maxima;         // [rows, chunks]: the largest x of each chunk that no rule touches
  std::uint8_t* faults;  // [rows]: 0 or 1 + RowFault
  bool ragged() const { return in->first.defined(); }
};

OFAKERN_LOCAL StepPlan plan_step(const StepInputs& in, Arena* arena) {
  StepPlan plan = {};
  plan.in = &in;
  plan.vocabulary = in.vocabulary;
  plan.rows = in.first.defined() ? in.first.shape[0] - 1 : in.logits.shape[0];
  plan.longest = in.first.defined() ? min_of(in.vocabulary, in.logits.shape[0]) : in.vocabulary;
  const i64 whole = in.first.defined() ? 0 : in.vocabulary;
  plan.pieces = ceil_div(whole, kPiece);
  plan.chunks = ceil_div(whole, kChunk);
  plan.sums = arena->take<ExpSum>(plan.rows * plan.pieces);
  plan.maxima = arena->take<float>(plan.rows * plan.chunks);
  plan.faults = arena->take<std::uint8_t>(plan.rows);
  return plan;
}

// What a row may be followed by, with the logits as they are; and a thread's other scratch.
struct Scratch {
  Marks marks;
  Bits allowed;
  i32* tokens;    // [longest]
  float* values;  // [longest]: logits, then x
  i64 count;      // of both
  bool special;   // is any of them marked?
  Scratch(Arena* arena, const StepPlan& plan)
      : marks(arena, plan.vocabulary),
        allowed(arena, plan.vocabulary),
        tokens(arena->take<i32>(plan.longest)),
        values(arena->take<float>(plan.longest)),
        count(0),
        special(false) {}
};

// One chunk of which a rule changes something, or that ends early: x in f32.
template <class T>
OFAKERN_LOCAL void sum_marked_chunk(const T* logits, i64 lo, i64 hi, const RowRules& rules, const Marks& marks,
                                    ExpSum* sum, float* largest) {
  float x[kChunk];
  for (i64 i = 0; i < kChunk; i += kWidth) {
    const i64 left = hi - lo - i;
    vstore(x + i, left >= kWidth ? vload_as(logits + lo + i) : vset(kLowest));
    for (i64 l = 0; l < left && left < kWidth; ++l) x[i + l] = to_float(logits[lo + i + l]);
  }
  marks.seen.each(lo, hi, [&](i64 token) { x[token - lo] = penalised(x[token - lo], rules, marks, token); });
  for (i64 i = 0; i < kChunk; ++i) x[i] *= rules.scale;
  add_chunk(x, largest_of(x), sum);
  marks.special.each(lo, hi, [&](i64 token) { x[token - lo] = kLowest; });
  *largest = largest_of(x);
}

// What is read a few chunks later: arithmetic on a chunk is long enough for the hardware's own prefetching to stop.
template <class T>
OFAKERN_HOT void prefetch_chunk(const T* p) {
  for (i64 i = 0; i < kChunk; i += 64 / static_cast<i64>(sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

// Sums the logits [lo, hi) of a row and leaves the chunks' maxima.
template <class T>
OFAKERN_LOCAL ExpSum sum_piece(const T* logits, i64 lo, i64 hi, const RowRules& rules, const Marks& marks,
                               float* maxima) {
  ExpSum sum;
  for (i64 at = lo; at < hi; at += kChunk) {
    float* largest = maxima + at / kChunk;
    if (at + kChunk > hi || rules.scale != 1 || marks.special.any(at, at + kChunk)) {
      sum_marked_chunk(logits, at, min_of(at + kChunk, hi), rules, marks, &sum, largest);
    } else {
      if (at + 9 * kChunk <= hi) prefetch_chunk(logits + at + 8 * kChunk);
      *largest = largest_of(logits + at);
      add_chunk(logits + at, *largest, &sum);
    }
  }
  return sum;
}

OFAKERN_HOT bool is_live(const StepPlan& plan, i64 row) { return entry<std::uint8_t>(plan.in->live, row, 1) != 0; }

// The first half of a step: rows whose softmax is over the whole vocabulary. skip(row): rows nobody looks at;
// marks_of(thread): scratch.
template <class T, class Skip, class MarksOf>
OFAKERN_LOCAL void sum_rows(const StepPlan& plan, int threads, const Skip& skip, const MarksOf& marks_of) {
  const StepInputs& in = *plan.in;
  parallel_for(plan.rows * plan.pieces, threads, [&](i64 task, int thread) {
    const i64 row = task / plan.pieces, lo = task % plan.pieces * kPiece, hi = min_of(lo + kPiece, plan.vocabulary);
    RowRules rules;
    if (skip(row) || !read_rules(in, row, &rules) || rules.alone) return;
    Marks& marks = marks_of(thread);
    Marker(in, rules, lo, hi, &marks);
    plan.sums[task] = sum_piece(in.logits.as<const T>() + row * in.logits.stride[0], lo, hi, rules, marks,
                                plan.maxima + row * plan.chunks);
  });
}

// Sets what the row's state allows, and its forced token.
OFAKERN_LOCAL void allow_state(const StepPlan& plan, const RowRules& rules, Bits* allowed) {
  const StepInputs& in = *plan.in;
  allowed->clear(0, plan.vocabulary);
  const auto allow = [&](i64 token) {
    if (token >= 0 && token < plan.vocabulary) allowed->set(token);
  };
  const Run tokens = run_of(in.state_first, rules.state, in.state_tokens.shape[0]);
  for (i64 i = tokens.begin; i < tokens.end; ++i) allow(in.state_tokens.as<const i32>()[i]);
  const Run ranges = run_of(in.range_first, rules.state, in.ranges.shape[0]);
  for (i64 i = ranges.begin; i < ranges.end; ++i) {
    const i32* range = in.ranges.as<const i32>() + 3 * i;
    allowed->set_range(max_of<i64>(range[0], 0), min_of<i64>(range[1], plan.vocabulary));
  }
  allow(rules.forced);
}

// The tokens that the row's state allows (and its forced one), or those of a ragged row, with their logits.
template <class T>
OFAKERN_LOCAL void list_allowed(const StepPlan& plan, i64 row, const RowRules& rules, Scratch* scratch) {
  const StepInputs& in = *plan.in;
  scratch->count = 0;
  if (plan.ragged()) {
    const Run run = run_of(in.first, row, in.tokens.shape[0]);
    for (i64 i = run.begin; i < run.end && scratch->count < plan.longest; ++i) {
      const i32 token = in.tokens.as<const i32>()[i];
      if (token < 0 || token >= plan.vocabulary) continue;
      scratch->tokens[scratch->count] = token;
      scratch->values[scratch->count++] = to_float(in.logits.as<const T>()[i]);
    }
    return;
  }
  allow_state(plan, rules, &scratch->allowed);
  const T* logits = in.logits.as<const T>() + row * in.logits.stride[0];
  scratch->allowed.each(0, plan.vocabulary, [&](i64 token) {
    scratch->tokens[scratch->count] = static_cast<i32>(token);
    scratch->values[scratch->count++] = to_float(logits[token]);
  });
}

// Turns the listed logits into x and returns the log of their sum; `scores` has the row's rules and marks.
OFAKERN_LOCAL double log_sum_of_list(const RowScores& scores, Scratch* scratch) {
  const i64 n = scratch->count;
  scratch->special = false;
  for (i64 i = 0; i < n; ++i)
    if (scores.marks.special.at(scratch->tokens[i])) {
      scratch->special = true;
      scratch->values[i] = penalised(scratch->values[i], scores.rules, scores.marks, scratch->tokens[i]);
    }
  for (i64 i = 0; i < n; ++i) scratch->values[i] *= scores.rules.scale;
  ExpSum sum;
  for (i64 at = 0; at < n; at += kChunk) {
    float rest[kChunk];
    const float* chunk = scratch->values + at;
    if (at + kChunk > n) {
      for (i64 i = 0; i < kChunk; ++i) rest[i] = at + i < n ? chunk[i] : kLowest;
      chunk = rest;
    }
    add_chunk(chunk, largest_of(chunk), &sum);
  }
  return log_of(&sum, 1);
}

// Marks the row and finds the log of its sum of exponentials. False when it is at fault, which is noted.
template <class T>
OFAKERN_LOCAL bool score_row(const StepPlan& plan, i64 row, Scratch* scratch, RowScores* scores) {
  scores->in = plan.in;
  if (!read_rules(*plan.in, row, &scores->rules)) {
    plan.faults[row] = 1 + kBadState;
    return false;
  }
  Marker(*plan.in, scores->rules, 0, plan.vocabulary, &scratch->marks);
  scores->marks = scratch->marks;
  scratch->count = 0;
  if (scores->rules.alone) {
    list_allowed<T>(plan, row, scores->rules, scratch);
    if (scratch->count == 0) return true;
    scores->log_sum = log_sum_of_list(*scores, scratch);
  } else {
    scores->log_sum = log_of(plan.sums + row * plan.pieces, plan.pieces);
  }
  if (scores->log_sum - scores->log_sum == 0 || plan.vocabulary == 0) return true;
  plan.faults[row] = 1 + kBadLogits;
  return false;
}

OFAKERN_HOT i64 first_fault(const StepPlan& plan) {
  for (i64 row = 0; row < plan.rows; ++row)
    if (plan.faults[row] != 0) return kRowFaults * row + plan.faults[row] - 1;
  return -1;
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

// The rules of one row, and the few places of the vocabulary where they act, as bits.
#pragma once

#include <cmath>

#include "core/arena.h"
#include "ops/beam_step/beam_step.h"

namespace ofakern::OFAKERN_ISA {
namespace {

using i32 = std::int32_t;
using u64 = std::uint64_t;

template <class X>
OFAKERN_HOT X entry(const TensorView& x, i64 row, X otherwise) {
  return x.defined() ? x.as<const X>()[row] : otherwise;
}

// Entries [begin, end) of a list whose offsets may lie.
struct Run {
  i64 begin, end;
};
OFAKERN_HOT Run run_of(const TensorView& first, i64 index, i64 entries) {
  const i64 begin = min_of(max_of<i64>(first.as<const i32>()[index], 0), entries);
  return {begin, min_of(max_of<i64>(first.as<const i32>()[index + 1], begin), entries)};
}

struct RowRules {
  float scale;       // 1 / temperature
  float repetition;  // 1: none
  float unk_penalty;
  i64 forced;   // -1: none
  bool no_eos;  // in force here
  i64 ngram;    // in force here; 0: none
  i64 state;    // -1: none
  bool alone;   // the softmax is over what may follow only
  const i32* history;
  i64 counted;  // tokens of the history
  const i32* adjust_tokens;
  const float* adjust_values;
  i64 adjustments;  // in force here
};

// False when the row's state is none of the automaton's.
OFAKERN_LOCAL bool read_rules(const StepInputs& in, i64 row, RowRules* rules) {
  rules->scale = in.temperature.defined() ? 1.0f / in.temperature.as<const float>()[row] : 1.0f;
  rules->repetition = entry(in.repetition, row, 1.0f);
  rules->unk_penalty = entry(in.unk_penalty, row, 0.0f);
  rules->forced = max_of(entry<i32>(in.forced, row, -1), -1);
  rules->state = max_of(entry<i32>(in.states, row, -1), -1);
  if (rules->state >= 0 && rules->state >= in.renormalise.shape[0]) return false;
  const bool known = rules->state >= 0;
  rules->alone = in.first.defined() || (known && in.renormalise.as<const std::uint8_t>()[rules->state] != 0);
  const bool open = rules->forced < 0, free = !known || in.free.as<const std::uint8_t>()[rules->state] != 0;
  rules->no_eos = open && free && entry<std::uint8_t>(in.no_eos, row, 0) != 0;
  rules->ngram = open && free ? entry<i32>(in.ngram, row, 0) : 0;
  rules->history = nullptr;
  rules->counted = 0;
  if (in.history.defined()) {
    const i64 begin = min_of(max_of<i64>(entry<i32>(in.counted_from, row, 0), 0), in.history.shape[1]);
    rules->history = in.history.as<const i32>() + row * in.history.stride[0] + begin;
    rules->counted = in.history.shape[1] - begin;
  }
  rules->adjustments = 0;
  if (open && in.adjust_first.defined()) {
    const Run run = run_of(in.adjust_first, row, in.adjust_tokens.shape[0]);
    rules->adjust_tokens = in.adjust_tokens.as<const i32>() + run.begin;
    rules->adjust_values = in.adjust_values.as<const float>() + run.begin;
    rules->adjustments = run.end - run.begin;
  }
  return true;
}

// A bit per token.
class Bits {
 public:
  Bits() = default;
  Bits(Arena* arena, i64 vocabulary) : words_(arena->take<u64>(count(vocabulary))) {}
  static i64 count(i64 vocabulary) { return ceil_div(vocabulary, 64); }
  // Clears the words that hold [lo, hi); lo is a multiple of 64.
  void clear(i64 lo, i64 hi) { std::memset(words_ + lo / 64, 0, static_cast<std::size_t>(count(hi) - lo / 64) * 8); }
  void set(i64 token) { words_[token >> 6] |= u64{1} << (token & 63); }
  void set_range(i64 lo, i64 hi) {
    for (i64 at = lo; at < hi;) {
      const i64 end = min_of(hi, (at | 63) + 1);
      const u64 upto = (end & 63) == 0 ? ~u64{0} : (u64{1} << (end & 63)) - 1;
      words_[at >> 6] |= upto & (~u64{0} << (at & 63));
      at = end;
    }
  }
  bool at(i64 token) const { return (words_[token >> 6] >> (token & 63) & 1) != 0; }
  u64 word(i64 index) const { return words_[index]; }
  bool any(i64 lo, i64 hi) const {  // of whole words
    u64 found = 0;
    for (i64 w = lo >> 6; w < count(hi); ++w) found |= words_[w];
    return found != 0;
  }
  // Calls body(token) for every set token of [lo, hi), ascending.
  template <class Body>
  void each(i64 lo, i64 hi, const Body& body) const {
    for (i64 w = lo >> 6; w < count(hi); ++w) {
      u64 word = words_[w];
      if (w == lo >> 6) word &= ~u64{0} << (lo & 63);
      for (; word != 0; word &= word - 1) {
        const i64 token = w * 64 + __builtin_ctzll(word);
        if (token >= hi) return;
        body(token);
      }
    }
  }

 private:
  u64* words_ = nullptr;
};

// special: tokens that any rule touches. seen: whose logit the repetition penalty changes. banned: never chosen.
struct Marks {
  Bits special, seen, banned;
  Marks() = default;
  Marks(Arena* arena, i64 vocabulary)
      : special(arena, vocabulary), seen(arena, vocabulary), banned(arena, vocabulary) {}
};

// Marks the tokens of [lo, hi), where lo is a multiple of 64.
class Marker {
 public:
  Marker(const StepInputs& in, const RowRules& rules, i64 lo, i64 hi, Marks* marks)
      : rules_(rules), lo_(lo), hi_(hi), marks_(marks) {
    marks->special.clear(lo, hi);
    marks->seen.clear(lo, hi);
    marks->banned.clear(lo, hi);
    ban(in.pad);
    if (rules.no_eos) ban(in.eos);
    if (rules.unk_penalty != 0) touch(in.unk);
    if (rules.repetition != 1)
      for (i64 i = 0; i < rules.counted; ++i)
        if (touch(rules.history[i])) marks->seen.set(rules.history[i]);
    if (rules.ngram > 0) ban_repeated();
    for (i64 i = 0; i < rules.adjustments; ++i) touch(rules.adjust_tokens[i]);
  }

 private:
  bool touch(i64 token) {
    if (token < lo_ || token >= hi_) return false;
    marks_->special.set(token);
    return true;
  }
  void ban(i64 token) {
    if (touch(token)) marks_->banned.set(token);
  }
  // Tokens that follow an earlier occurrence of the newest ngram - 1 tokens.
  void ban_repeated() {
    const i64 head = rules_.ngram - 1, last = rules_.counted - rules_.ngram;
    if (last < 0) return;
    const i32* tail = rules_.history + rules_.counted - head;
    for (i64 begin = 0; begin <= last; ++begin) {
      i64 same = 0;
      while (same < head && rules_.history[begin + same] == tail[same]) ++same;
      if (same == head) ban(rules_.history[begin + head]);
    }
  }

  const RowRules& rules_;
  i64 lo_, hi_;
  Marks* marks_;
};

OFAKERN_HOT float penalised(float logit, const RowRules& rules, const Marks& marks, i64 token) {
  if (rules.repetition == 1 || !marks.seen.at(token)) return logit;
  return logit > 0 ? logit / rules.repetition : logit * rules.repetition;
}

// What a row's candidates are scored by.
struct RowScores {
  const StepInputs* in;
  RowRules rules;
  Marks marks;  // of the whole vocabulary
  double log_sum;

  float plain(float x) const { return static_cast<float>(static_cast<double>(x) - log_sum); }

  // The log-probability of a token with every rule applied but the automaton's; -inf where it may not follow.
  float log_prob(i64 token, float x) const {
    if (marks.banned.at(token)) return -INFINITY;
    float p = plain(x);
    if (token == in->unk) p -= rules.unk_penalty;
    for (i64 i = 0; i < rules.adjustments; ++i)
      if (rules.adjust_tokens[i] == token) p += rules.adjust_values[i];
    return p;
  }
  float log_prob_of_logit(i64 token, float logit) const {
    return log_prob(token, penalised(logit, rules, marks, token) * rules.scale);
  }
};

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

// What the CUDA kernels of beam_step and sample_step share: the call, a row's rules, and the marks that rules leave.
//
// A row is a run of positions: tokens of the vocabulary, or the entries of a ragged row. Indices inside tensors are
// clipped or ignored, never followed out of bounds.
#pragma once

#include "core/simt.h"
#include "ops/beam_step/beam_step.h"

namespace ofakern {
namespace {

using namespace simt;
using i64 = std::int64_t;

constexpr float kNever = -INFINITY;
constexpr int kPiece = 8192;  // positions whose marks are kept at once
constexpr int kPieceWords = kPiece / 32;

struct StepCall {
  const void* logits;
  const int *first, *tokens;
  const float* temperature;
  const std::uint8_t* live;
  const int* forced;
  const std::uint8_t* no_eos;
  const float* repetition;
  const int *history, *counted_from, *ngram;
  const float* unk_penalty;
  const int *adjust_first, *adjust_tokens;
  const float* adjust_values;
  const int *states, *state_first, *state_tokens, *range_first, *ranges;
  const std::uint8_t *renormalise, *free;
  i64 row_stride, history_stride, entries;
  int history_length, adjustments, state_entries, range_entries, state_count;
  int rows, vocabulary, pad, eos, unk;
  DType dtype;
};

inline StepCall step_call(const StepInputs& in) {
  const auto size = [](const TensorView& x) { return x.defined() ? static_cast<int>(x.shape[0]) : 0; };
  StepCall c = {};
  c.logits = in.logits.data;
  c.first = in.first.as<const int>();
  c.tokens = in.tokens.as<const int>();
  c.temperature = in.temperature.as<const float>();
  c.live = in.live.as<const std::uint8_t>();
  c.forced = in.forced.as<const int>();
  c.no_eos = in.no_eos.as<const std::uint8_t>();
  c.repetition = in.repetition.as<const float>();
  c.history = in.history.as<const int>();
  c.counted_from = in.counted_from.as<const int>();
  c.ngram = in.ngram.as<const int>();
  c.unk_penalty = in.unk_penalty.as<const float>();
  c.adjust_first = in.adjust_first.as<const int>();
  c.adjust_tokens = in.adjust_tokens.as<const int>();
  c.adjust_values = in.adjust_values.as<const float>();
  c.states = in.states.as<const int>();
  c.state_first = in.state_first.as<const int>();
  c.state_tokens = in.state_tokens.as<const int>();
  c.range_first = in.range_first.as<const int>();
  c.ranges = in.ranges.as<const int>();
  c.renormalise = in.renormalise.as<const std::uint8_t>();
  c.free = in.free.as<const std::uint8_t>();
  c.row_stride = in.first.defined() ? 0 : in.logits.stride[0];
  c.history_stride = in.history.defined() ? in.history.stride[0] : 0;
  c.entries = in.first.defined() ? in.tokens.shape[0] : 0;
  c.history_length = in.history.defined() ? static_cast<int>(in.history.shape[1]) : 0;
  c.adjustments = size(in.adjust_tokens);
  c.state_entries = size(in.state_tokens);
  c.range_entries = size(in.ranges);
  c.state_count = size(in.renormalise);
  c.rows = static_cast<int>(in.first.defined() ? in.first.shape[0] - 1 : in.logits.shape[0]);
  c.vocabulary = static_cast<int>(in.vocabulary);
  c.pad = static_cast<int>(in.pad);
  c.eos = static_cast<int>(in.eos);
  c.unk = static_cast<int>(in.unk);
  c.dtype = in.logits.dtype;
  return c;
}

// The most positions that a row can have.
inline i64 longest_row(const StepInputs& in) {
  return in.first.defined() && in.tokens.shape[0] < in.vocabulary ? in.tokens.shape[0] : in.vocabulary;
}

__device__ __forceinline__ int clip(int x, int lo, int hi) { return x < lo ? lo : (x > hi ? hi : x); }

template <class X>
__device__ __forceinline__ X entry(const X* x, int row, X otherwise) {
  return x == nullptr ? otherwise : x[row];
}

// Entries [begin, end) of a list whose offsets may lie.
struct Run {
  int begin, end;
};
__device__ __forceinline__ Run run_of(const int* first, int index, int entries) {
  const int begin = clip(first[index], 0, entries);
  return {begin, clip(first[index + 1], begin, entries)};
}

struct RowRules {
  i64 from;    // of the row's logits
  int length;  // positions
  float scale, repetition, unk_penalty;
  int forced, ngram, state;  // -1, 0, -1: none
  bool no_eos, bad_state;
  bool alone;    // the softmax is over what may follow only
  bool flagged;  // some position is not like all others
  const int* history;
  int counted;
  Run adjust;
};

__device__ __forceinline__ bool is_live(const StepCall& c, int row) { return entry<std::uint8_t>(c.live, row, 1) != 0; }

__device__ inline RowRules rules_of(const StepCall& c, int row) {
  RowRules r;
  const bool ragged = c.first != nullptr;
  r.from = row * c.row_stride;
  r.length = c.vocabulary;
  if (ragged) {
    const Run run = run_of(c.first, row, static_cast<int>(c.entries));
    r.from = run.begin;
    r.length = min(run.end - run.begin, c.vocabulary);
  }
  r.scale = c.temperature == nullptr ? 1.0f : 1.0f / c.temperature[row];
  r.repetition = entry(c.repetition, row, 1.0f);
  r.unk_penalty = entry(c.unk_penalty, row, 0.0f);
  r.forced = max(entry(c.forced, row, -1), -1);
  r.state = max(entry(c.states, row, -1), -1);
  r.bad_state = r.state >= c.state_count;
  if (r.bad_state) r.state = -1;
  const bool open = r.forced < 0, known = r.state >= 0, free = !known || c.free[r.state] != 0;
  r.alone = ragged || (known && c.renormalise[r.state] != 0);
  r.no_eos = open && free && entry<std::uint8_t>(c.no_eos, row, 0) != 0;
  r.ngram = open && free ? max(entry(c.ngram, row, 0), 0) : 0;
  const int begin = clip(entry(c.counted_from, row, 0), 0, c.history_length);
  r.history = c.history == nullptr ? nullptr : c.history + row * c.history_stride + begin;
  r.counted = c.history_length - begin;
  r.adjust = open && c.adjust_first != nullptr ? run_of(c.adjust_first, row, c.adjustments) : Run{0, 0};
  r.flagged =
      known || r.no_eos || r.unk_penalty != 0 || r.repetition != 1 || r.ngram > 0 || r.adjust.begin < r.adjust.end;
  return r;
}

__device__ __forceinline__ int token_at(const StepCall& c, const RowRules& r, int position) {
  return c.first == nullptr ? position : c.tokens[r.from + position];
}

// The position of a token, -1 for none.
__device__ inline int position_of(const StepCall& c, const RowRules& r, int token) {
  if (token < 0 || token >= c.vocabulary) return -1;
  if (c.first == nullptr) return token;
  int lo = 0, hi = r.length;
  while (lo < hi) {
    const int middle = (lo + hi) / 2;
    if (c.tokens[r.from + middle] < token)
      lo = middle + 1;
    else
      hi = middle;
  }
  return lo < r.length && c.tokens[r.from + lo] == token ? lo : -1;
}

__device__ __forceinline__ float logit_at(const StepCall& c, const RowRules& r, int position) {
  const i64 at = r.from + position;
  if (c.dtype == DType::f32) return static_cast<const float*>(c.logits)[at];
  return c.dtype == DType::bf16 ? to_float(static_cast<const __nv_bfloat16*>(c.logits)[at])
                                : to_float(static_cast<const __half*>(c.logits)[at]);
}

__device__ __forceinline__ float penalised(float logit, float penalty) {
  return logit > 0 ? logit / penalty : logit * penalty;
}

// exp of x <= 0 or a little above. log2 e in two parts: the error of one would have the same sign in all terms.
__device__ __forceinline__ float exp_of(float x) { return exp2f(fmaf(x, 1.925963033e-8f, x * 1.44269504088896341f)); }

// The log-probability of a position that no rule touches: rounded once.
__device__ __forceinline__ float plain(float x, double log_sum) {
  return static_cast<float>(static_cast<double>(x) - log_sum);
}

// Of a position that a rule touches and none bans.
__device__ inline float touched(const StepCall& c, const RowRules& r, int token, float x, double log_sum) {
  float p = plain(x, log_sum);
  if (token == c.unk) p -= r.unk_penalty;
  for (int i = r.adjust.begin; i < r.adjust.end; ++i)
    if (c.adjust_tokens[i] == token) p += c.adjust_values[i];
  return p;
}

// Larger floats have larger keys; -0 is 0.
__device__ __forceinline__ unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float float_of(unsigned key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7FFFFFFFu : ~key);
}

// A bit per position of a piece, in shared memory. special: any rule touches it. seen: the repetition penalty does.
// banned: it never follows. allowed: by the row's state.
struct Marks {
  unsigned *special, *seen, *banned, *allowed;  // [kPieceWords]
};

__device__ __forceinline__ bool bit(const unsigned* words, int at) { return (words[at >> 5] >> (at & 31) & 1) != 0; }

// Marks of the positions [lo, lo + kPiece) of a flagged row, by a whole block.
class Marker {
 public:
  __device__ Marker(const StepCall& call, const RowRules& rules, int from, const Marks& marks)
      : c(call), r(rules), lo(from), m(marks) {}

  __device__ void run() const {
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < kPieceWords; i += threads) {
      m.special[i] = m.seen[i] = m.banned[i] = 0;
      m.allowed[i] = r.state < 0 ? ~0u : 0u;
    }
    sync_block();
    if (thread == 0) {
      mark(c.pad, m.special, m.banned);
      if (r.no_eos) mark(c.eos, m.special, m.banned);
      if (r.unk_penalty != 0) mark(c.unk, m.special);
      if (r.alone && r.forced >= 0) mark(r.forced, m.allowed);
    }
    if (r.repetition != 1)
      for (int i = thread; i < r.counted; i += threads) mark(r.history[i], m.special, m.seen);
    if (r.ngram > 0)
      for (int i = thread; i <= r.counted - r.ngram; i += threads) ban_repeated(i);
    for (int i = r.adjust.begin + thread; i < r.adjust.end; i += threads) mark(c.adjust_tokens[i], m.special);
    if (r.state >= 0) allow(thread, threads);
    sync_block();
  }

 private:
  __device__ void mark(int token, unsigned* words, unsigned* more = nullptr) const {
    const int position = position_of(c, r, token);
    if (position < lo || position >= lo + kPiece) return;
    const int at = position - lo;
    atomic_or(words + (at >> 5), 1u << (at & 31));
    if (more != nullptr) atomic_or(more + (at >> 5), 1u << (at & 31));
  }

  // The token behind an earlier occurrence, at `begin`, of the newest ngram - 1 tokens.
  __device__ void ban_repeated(int begin) const {
    const int head = r.ngram - 1;
    const int* tail = r.history + r.counted - head;
    int same = 0;
    while (same < head && r.history[begin + same] == tail[same]) ++same;
    if (same == head) mark(r.history[begin + head], m.special, m.banned);
  }

  __device__ void allow(int thread, int threads) const {
    const Run tokens = run_of(c.state_first, r.state, c.state_entries);
    for (int i = tokens.begin + thread; i < tokens.end; i += threads) mark(c.state_tokens[i], m.allowed);
    const Run ranges = run_of(c.range_first, r.state, c.range_entries);
    for (int i = ranges.begin; i < ranges.end; ++i) {
      const int begin = clip(c.ranges[3 * i], lo, lo + kPiece) - lo;
      const int end = clip(min(c.ranges[3 * i + 1], c.vocabulary), lo, lo + kPiece) - lo;
      for (int word = begin / 32 + thread; word * 32 < end; word += threads) {
        const unsigned below = word * 32 < begin ? (1u << (begin & 31)) - 1 : 0u;
        const unsigned upto = word * 32 + 32 > end ? (1u << (end & 31)) - 1 : ~0u;
        if ((upto & ~below) != 0) atomic_or(m.allowed + word, upto & ~below);
      }
    }
  }

  const StepCall& c;
  const RowRules& r;
  int lo;
  const Marks& m;
};

// One position of a piece. counts: it takes part in the softmax. plain, offered: it is a candidate, of no rule or
// touched by one.
struct Position {
  int token;
  float x;
  bool counts, plain, offered;
};

__device__ __forceinline__ Position position_at(const StepCall& c, const RowRules& r, const Marks& m, int lo, int at) {
  Position p = {-1, kNever, false, false, false};
  if (lo + at >= r.length) return p;
  p.token = token_at(c, r, lo + at);
  if (p.token < 0 || p.token >= c.vocabulary) return p;
  const bool allowed = !r.flagged || bit(m.allowed, at);
  p.counts = !r.alone || allowed;
  if (!p.counts) return p;
  const float logit = logit_at(c, r, lo + at);
  if (!r.flagged) {
    p.x = logit * r.scale;
    p.plain = p.token != c.pad;
    return p;
  }
  p.x = (bit(m.seen, at) ? penalised(logit, r.repetition) : logit) * r.scale;
  const bool special = bit(m.special, at);
  p.plain = allowed && !special;
  p.offered = allowed && special && !bit(m.banned, at);
  return p;
}

__device__ __forceinline__ double sum_of_lanes(double v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

}  // namespace
}  // namespace ofakern

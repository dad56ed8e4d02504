// The second half of beam_step: one block chooses a sample's best continuations from what the first half has left.
//
// A candidate is a 64-bit key: its score's order, then its row and token, smaller ones first. Keys differ, so that any
// way to find the `width` largest gives the same result. The quick way goes through the maxima of sets of 32
// positions: a block's threads each look at the maxima of every 256th set, and the width-th largest of what they find
// is a score that `width` positions reach; few sets reach it, and only those are read again. Where that leaves too much
// (more candidates asked for than threads, many equal scores) a radix selection over all positions follows.
#pragma once

#include "ops/beam_step/step_call.cuh"

namespace ofakern {
namespace {

using Key = unsigned long long;

constexpr int kBeamThreads = 256;
constexpr int kSetSize = kPiece / kBeamThreads;  // positions t, t + 256, ... of a piece
constexpr int kListed = 2048;                    // candidates that are put in order
static_assert(kListed >= kMostWideCuda, "a selection leaves as many as are asked for");
constexpr unsigned kLowestKey = 0x00800000u;  // of the lowest finite score
constexpr int kBadOffsets = 3;                // beside RowFault

// What the first half knows of a piece of a row: its part of the softmax is sum * exp(largest).
struct PieceSum {
  double sum;
  float largest;
  int given;  // whether any position takes part
};

struct RowTotal {
  double log_sum;
  int fault;   // 0, or 1 + RowFault
  int usable;  // it has candidates
};

struct BeamCall {
  StepCall step;
  const float* sums;
  const int* row_offsets;
  float* scores;
  int *origins, *tokens;
  float* log_probs;
  int* arrived;                      // [samples]: zeros before and after a call
  PieceSum* piece_sums;              // [R, pieces]
  float* maxima;                     // [R, pieces, 256]: each set's largest x that no rule touches
  unsigned *plain, *offered, *seen;  // [R, pieces, 256] bits, written for flagged rows
  RowTotal* totals;                  // [R]
  int samples, pieces, width;
};

struct RowSpan {
  int begin, end;
};
__device__ __forceinline__ RowSpan rows_of(const BeamCall& c, int sample) {
  const int begin = clip(c.row_offsets[sample], 0, c.step.rows);
  return {begin, clip(c.row_offsets[sample + 1], begin, c.step.rows)};
}

__device__ __forceinline__ bool is_looked_at(const BeamCall& c, int row) {
  return is_live(c.step, row) && c.sums[row] != kNever;
}

__device__ __forceinline__ void write_candidate(const BeamCall& c, int sample, int place, float score, int origin,
                                                int token, float log_prob) {
  const i64 at = static_cast<i64>(sample) * c.width + place;
  c.scores[at] = score;
  c.origins[at] = origin;
  c.tokens[at] = token;
  c.log_probs[at] = log_prob;
}

// The marks a whole sample's results carry: NaN, the row, and which fault.
__device__ __forceinline__ void write_fault(const BeamCall& c, int sample, int place, int row, int fault) {
  write_candidate(c, sample, place, NAN, row, -2 - fault, NAN);
}

class Chooser {
 public:
  __device__ Chooser(const BeamCall& call, int of_sample)
      : c(call), sample(of_sample), thread(static_cast<int>(threadIdx.x)), span(rows_of(call, of_sample)) {}

  __device__ void run() const {
    OFAKERN_SHARED(Key, list, kListed);
    OFAKERN_SHARED(int, counters, 260);
    for (int row = span.begin + warp(); row < span.end; row += kBeamThreads / 32) total_row(row);
    if (thread == 0) {
      counters[0] = 0;          // candidates in the list
      counters[1] = INT32_MAX;  // the first row at fault
    }
    sync_block();
    for (int row = span.begin + thread; row < span.end; row += kBeamThreads)
      if (c.totals[row].fault != 0) atomic_min(&counters[1], row);
    sync_block();
    const int bad = counters[1];
    if (bad != INT32_MAX) {
      for (int i = thread; i < c.width; i += kBeamThreads)
        write_fault(c, sample, i, bad - span.begin, c.totals[bad].fault - 1);
      return;
    }
    gather_above(threshold(reinterpret_cast<unsigned*>(list)), list, &counters[0]);
    sync_block();
    if (counters[0] > kListed) {
      const Key lowest = select(counters + 1);
      if (thread == 0) counters[0] = 0;
      sync_block();
      each_position([&](Key key) {
        if (key >= lowest) list[atomic_add(&counters[0], 1)] = key;
      });
      sync_block();
    }
    put_in_order(list, counters[0]);
  }

 private:
  // A warp adds up a row's pieces.
  __device__ void total_row(int row) const {
    RowTotal t = {0.0, 0, 0};
    if (is_looked_at(c, row)) {
      const RowRules r = rules_of(c.step, row);
      const float sum = c.sums[row];
      float largest = kNever;
      bool given = false;
      const PieceSum* pieces = c.piece_sums + static_cast<i64>(row) * c.pieces;
      for (int i = lane(); i < c.pieces; i += 32) {
        largest = fmaxf(largest, pieces[i].largest);
        given = given || pieces[i].given != 0;
      }
      largest = warp_max(largest);
      given = any(given);
      double total = 0.0;
      for (int i = lane(); i < c.pieces; i += 32)
        total += pieces[i].largest == kNever
                     ? pieces[i].sum  // 0, or no number
                     : pieces[i].sum * exp(static_cast<double>(pieces[i].largest) - static_cast<double>(largest));
      total = sum_of_lanes(total);
      t.log_sum = log(total) + static_cast<double>(largest);
      const bool finite = t.log_sum - t.log_sum == 0;
      t.usable = given && finite ? 1 : 0;
      if (sum - sum != 0)
        t.fault = 1 + static_cast<int>(kBadSum);
      else if (r.bad_state)
        t.fault = 1 + static_cast<int>(kBadState);
      else if (given && !finite)
        t.fault = 1 + static_cast<int>(kBadLogits);
    }
    if (lane() == 0) c.totals[row] = t;
  }

  __device__ Key key_at(int row, int position, float p) const {
    const float score = c.sums[row] + p;
    if (!(score > kNever)) return 0;
    const i64 place = static_cast<i64>(row - span.begin) * c.step.vocabulary + position;
    return static_cast<Key>(key_of(score)) << 32 | (0xFFFFFFFFu - static_cast<unsigned>(place));
  }

  __device__ i64 word_at(int row, int position) const {
    return static_cast<i64>(row) * c.pieces * kPieceWords + (position >> 5);
  }
  __device__ bool has(const unsigned* words, int row, int position) const {
    return (words[word_at(row, position)] >> (position & 31) & 1) != 0;
  }

  // The log-probability of a position that may be chosen, with all rules.
  __device__ float log_prob(int row, const RowRules& r, int position) const {
    const double log_sum = c.totals[row].log_sum;
    const float logit = logit_at(c.step, r, position);
    const bool seen = r.repetition != 1 && has(c.seen, row, position);
    const float x = (seen ? penalised(logit, r.repetition) : logit) * r.scale;
    return r.flagged ? touched(c.step, r, token_at(c.step, r, position), x, log_sum) : plain(x, log_sum);
  }

  // 0: no candidate.
  __device__ Key candidate(int row, const RowRules& r, int position) const {
    if (position < 0 || position >= r.length) return 0;
    const int token = token_at(c.step, r, position);
    if (token < 0 || token >= c.step.vocabulary || token == c.step.pad) return 0;
    if (r.forced >= 0) return token == r.forced ? key_at(row, position, log_prob(row, r, position)) : 0;
    if (r.flagged && !has(c.plain, row, position) && !has(c.offered, row, position)) return 0;
    return key_at(row, position, log_prob(row, r, position));
  }

  template <class Body>
  __device__ void each_position(const Body& body) const {
    for (int row = span.begin; row < span.end; ++row) {
      if (c.totals[row].usable == 0) continue;
      const RowRules r = rules_of(c.step, row);
      for (int position = thread; position < r.length; position += kBeamThreads) {
        const Key key = candidate(row, r, position);
        if (key != 0) body(key);
      }
    }
  }

  // body(row, piece, key of the set's best score or 0) of this thread's set of every piece of the sample. Maxima are on
  // their way eight at a time.
  template <class Body>
  __device__ void each_set(const Body& body) const {
    constexpr int kAhead = 8;
    const int count = (span.end - span.begin) * c.pieces;
    const float* maxima = c.maxima + static_cast<i64>(span.begin) * c.pieces * kBeamThreads + thread;
    for (int from = 0; from < count; from += kAhead) {
      float largest[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        largest[i] = from + i < count ? maxima[static_cast<i64>(from + i) * kBeamThreads] : kNever;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (from + i >= count) continue;
        const int row = span.begin + (from + i) / c.pieces;
        const RowTotal total = c.totals[row];
        unsigned key = 0;
        if (total.usable != 0 && largest[i] > kNever) key = key_of(c.sums[row] + plain(largest[i], total.log_sum));
        body(row, (from + i) % c.pieces, key >= kLowestKey ? key : 0);
      }
    }
  }

  // A score that `width` positions reach. best [256] is in shared memory.
  __device__ unsigned threshold(unsigned* best) const {
    unsigned mine = 0;
    each_set([&](int, int, unsigned key) { mine = max(mine, key); });
    best[thread] = mine;
    best[kBeamThreads + thread] = kLowestKey;
    sync_block();
    int above = 0, reach = 0;
    for (int i = 0; i < kBeamThreads; ++i) {
      above += best[i] > mine ? 1 : 0;
      reach += best[i] >= mine ? 1 : 0;
    }
    // All threads for which this holds have the same key.
    if (mine != 0 && above < c.width && reach >= c.width) best[kBeamThreads] = mine;
    sync_block();
    const unsigned found = best[kBeamThreads];
    sync_block();  // the list takes this place
    return found;
  }

  __device__ void add(Key key, unsigned lowest, Key* list, int* count) const {
    if (key >> 32 < lowest) return;
    const int place = atomic_add(count, 1);
    if (place < kListed) list[place] = key;
  }

  __device__ void gather_above(unsigned lowest, Key* list, int* count) const {
    each_set([&](int row, int piece, unsigned key) {
      unsigned reaching = ballot(key >= lowest);
      if (reaching == 0) return;
      const RowRules r = rules_of(c.step, row);
      for (; reaching != 0; reaching &= reaching - 1) {  // the warp reads a set together
        const int set = warp() * 32 + __ffs(static_cast<int>(reaching)) - 1;
        const int position = piece * kPiece + set + lane() * kBeamThreads;
        if (r.forced < 0 && (!r.flagged || (position < r.length && has(c.plain, row, position))))
          add(candidate(row, r, position), lowest, list, count);
      }
    });
    for (int row = span.begin; row < span.end; ++row) {
      if (c.totals[row].usable == 0) continue;
      const RowRules r = rules_of(c.step, row);
      if (r.forced >= 0) {
        if (thread == 0) add(candidate(row, r, position_of(c.step, r, r.forced)), lowest, list, count);
      } else if (r.flagged) {
        for (int word = thread; word * 32 < r.length; word += kBeamThreads)
          for (unsigned bits = c.offered[word_at(row, word * 32)]; bits != 0; bits &= bits - 1)
            add(candidate(row, r, word * 32 + __ffs(static_cast<int>(bits)) - 1), lowest, list, count);
      }
    }
  }

  // The width-th largest key, 1 where there are fewer. counts [256] is in shared memory.
  __device__ Key select(int* counts) const {
    Key prefix = 0, known = 0;
    int wanted = c.width;
    for (int shift = 56; shift >= 0; shift -= 8) {
      counts[thread] = 0;
      sync_block();
      each_position([&](Key key) {
        if ((key & known) == prefix) atomic_add(&counts[key >> shift & 255], 1);
      });
      sync_block();
      int digit = 255, before = 0;
      for (; digit >= 0 && before + counts[digit] < wanted; --digit) before += counts[digit];
      sync_block();
      if (digit < 0) return 1;  // only of the first digit: there are fewer than wanted
      wanted -= before;
      prefix |= static_cast<Key>(digit) << shift;
      known |= static_cast<Key>(255) << shift;
    }
    return prefix;
  }

  // The best `width` of a list, whose order is by chance.
  __device__ void put_in_order(const Key* list, int count) const {
    for (int i = thread; i < count; i += kBeamThreads) {
      const Key key = list[i];
      int place = 0;
      for (int j = 0; j < count; ++j) place += list[j] > key ? 1 : 0;
      if (place >= c.width) continue;
      const i64 where = 0xFFFFFFFFu - static_cast<unsigned>(key);
      const int origin = static_cast<int>(where / c.step.vocabulary);
      const int position = static_cast<int>(where % c.step.vocabulary), row = span.begin + origin;
      const RowRules r = rules_of(c.step, row);
      write_candidate(c, sample, place, float_of(static_cast<unsigned>(key >> 32)), origin,
                      token_at(c.step, r, position), log_prob(row, r, position));
    }
    for (int i = min(count, c.width) + thread; i < c.width; i += kBeamThreads)
      write_candidate(c, sample, i, kNever, 0, -1, kNever);
  }

  const BeamCall& c;
  int sample, thread;
  RowSpan span;
};

}  // namespace
}  // namespace ofakern

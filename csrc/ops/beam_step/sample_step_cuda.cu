// One drawn token per row, a block each. Nothing is sorted: a filter finds the last entry it keeps digit by digit of a
// key, and the draw walks cumulative weights in the order of ids.
//
// What may follow stands in the workspace as log-probabilities, -inf where nothing does; filters put -inf in the place
// of what they drop. Sums are f64, in an order that follows from the vocabulary alone.
#include <algorithm>

#include "ops/beam_step/step_call.cuh"

namespace ofakern {
namespace {

constexpr int kMostWarps = 32;

struct SampleCall {
  StepCall step;
  const float* uniforms;
  const int* top_k;
  const float *top_p, *typical_p, *min_p;
  int* tokens;
  float* log_probs;
  float* values;        // [R, longest]: x, then log-probabilities
  std::uint8_t* kinds;  // [R, longest]: kPlain, kOffered, or 0
  i64 longest;
};

enum Kind : std::uint8_t { kPlain = 1, kOffered = 2 };

// Sums and maxima over a block; every thread gets them.
struct BlockSums {
  double* room;  // [4 * kMostWarps]
  float* largest_room;

  __device__ float largest(float v) const {
    v = warp_max(v);
    if (lane() == 0) largest_room[warp()] = v;
    sync_block();
    float most = kNever;
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) most = fmaxf(most, largest_room[w]);
    sync_block();
    return most;
  }
  template <int n>
  __device__ void sum(double (&v)[n]) const {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      v[i] = sum_of_lanes(v[i]);
      if (lane() == 0) room[i * kMostWarps + warp()] = v[i];
    }
    sync_block();
#pragma unroll
    for (int i = 0; i < n; ++i) {
      v[i] = 0.0;
      for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) v[i] += room[i * kMostWarps + w];
    }
    sync_block();
  }
  __device__ double sum(double v) const {
    double one[1] = {v};
    sum(one);
    return one[0];
  }
};

// exp(x), x <= 0: a weight in proportion to a probability.
__device__ __forceinline__ double weight_of(float x) { return static_cast<double>(exp_of(x)); }

// A row's candidates: log-probabilities in `values`, in the order of ids.
class Candidates {
 public:
  __device__ Candidates(float* of_row, int positions, const BlockSums& block_sums)
      : values(of_row),
        length(positions),
        thread(static_cast<int>(threadIdx.x)),
        threads(static_cast<int>(blockDim.x)),
        sums(block_sums) {}

  __device__ float best() const {
    float most = kNever;
    for (int i = thread; i < length; i += threads) most = fmaxf(most, values[i]);
    return sums.largest(most);
  }
  __device__ double count() const {
    double found = 0.0;
    for (int i = thread; i < length; i += threads) found += values[i] > kNever ? 1.0 : 0.0;
    return sums.sum(found);
  }
  __device__ double mass(float best) const {
    double found = 0.0;
    for (int i = thread; i < length; i += threads)
      if (values[i] > kNever) found += weight_of(values[i] - best);
    return sums.sum(found);
  }

  __device__ void keep_top_k(int k) const {
    if (k <= 0 || static_cast<double>(k) >= count()) return;
    keep_largest(static_cast<double>(k), [](float p) { return key_of(p); }, [](float) { return 1.0; });
  }

  // The most probable whose predecessors hold less than `part` of all.
  __device__ void keep_nucleus(float part) const {
    const float most = best();
    keep_largest(
        limit_of(part, mass(most)), [](float p) { return key_of(p); }, [=](float p) { return weight_of(p - most); });
  }

  __device__ void keep_probable(float least) const {
    const float most = best();
    for (int i = thread; i < length; i += threads)
      if (values[i] > kNever && !(exp_of(values[i] - most) >= least || values[i] == most)) values[i] = kNever;
    sync_block();
  }

  // As keep_nucleus, in the order of |surprise - entropy|.
  __device__ void keep_typical(float part) const {
    const float most = best();
    double both[2] = {0.0, 0.0};  // weights, and weights times log-probabilities
    for (int i = thread; i < length; i += threads)
      if (values[i] > kNever) {
        const double w = weight_of(values[i] - most);
        both[0] += w;
        both[1] += w * static_cast<double>(values[i]);
      }
    sums.sum(both);
    const double mean = both[1] / both[0];
    keep_largest(
        limit_of(part, both[0]),
        [=](float p) { return ~__float_as_uint(static_cast<float>(fabs(static_cast<double>(p) - mean))); },
        [=](float p) { return weight_of(p - most); });
  }

  // The position at which the cumulative weight exceeds uniform * all.
  __device__ int draw(float uniform, double* of_warps, int* found) const {
    const float most = best();
    const auto weight = [=](float p) { return p > kNever ? weight_of(p - most) : 0.0; };
    const double all = sum_of_ranges(weight, of_warps);
    const double wanted = static_cast<double>(uniform) * all;
    int owner = -1;  // the warp whose range holds the place, or the last one that holds anything
    double before = 0.0, before_owner = 0.0;
    for (int w = 0; w < threads / 32; ++w) {
      if (of_warps[w] > 0.0) {
        owner = w;
        before_owner = before;
        if (before + of_warps[w] > wanted) break;
      }
      before += of_warps[w];
    }
    if (warp() == owner) {
      int last = 0;
      double running = before_owner;
      for (int from = range_begin(owner); from < range_begin(owner + 1); from += 32) {
        const int i = from + lane();
        const double w = i < range_begin(owner + 1) ? weight(values[i]) : 0.0;
        const double upto = running + inclusive(w);
        const unsigned over = ballot(w > 0.0 && upto > wanted), some = ballot(w > 0.0);
        if (some != 0) last = from + 31 - __clz(static_cast<int>(some));
        if (over != 0) {
          last = from + __ffs(static_cast<int>(over)) - 1;
          break;
        }
        running = shuffle(upto, 31);
      }
      if (lane() == 0) *found = last;
    }
    sync_block();
    return *found;
  }

 private:
  __device__ static double limit_of(float part, double all) {
    const double limit = static_cast<double>(part) * all;
    return limit > 1e-300 ? limit : 1e-300;  // one is always left
  }

  // A warp's own run of positions: for what depends on their order.
  __device__ int range_begin(int w) const {
    const int each = (length + threads - 1) / threads * 32;
    return min(w * each, length);
  }
  __device__ static double inclusive(double v) {
#pragma unroll
    for (int n = 1; n < 32; n *= 2) {
      const double other = shuffle_up(v, static_cast<unsigned>(n));
      if (lane() >= n) v += other;
    }
    return v;
  }
  // Each warp's sum over its range, and all of them in order.
  template <class Weight>
  __device__ double sum_of_ranges(const Weight& weight, double* of_warps) const {
    double mine = 0.0;
    for (int i = range_begin(warp()) + lane(); i < range_begin(warp() + 1); i += 32) mine += weight(values[i]);
    mine = sum_of_lanes(mine);
    if (lane() == 0) of_warps[warp()] = mine;
    sync_block();
    double all = 0.0;
    for (int w = 0; w < threads / 32; ++w) all += of_warps[w];
    return all;
  }

  // Keeps entries, largest key first (equal keys: earlier first), while those before hold less than `limit`.
  template <class KeyOf, class Weight>
  __device__ void keep_largest(double limit, const KeyOf& key, const Weight& weight) const {
    unsigned prefix = 0, known = 0;
    double before = 0.0;
    for (int shift = 30; shift >= 0; shift -= 2) {  // two bits of the last key that is kept
      double held[4] = {0.0, 0.0, 0.0, 0.0};
      for (int i = thread; i < length; i += threads) {
        if (!(values[i] > kNever)) continue;
        const unsigned k = key(values[i]), digit = k >> shift & 3u;
        if ((k & known) != prefix) continue;
        const double w = weight(values[i]);
#pragma unroll
        for (unsigned d = 0; d < 4; ++d) held[d] += digit == d ? w : 0.0;
      }
      sums.sum(held);
      unsigned digit = 4, lowest = 0;
      double before_lowest = before;
#pragma unroll
      for (int d = 3; d >= 0; --d) {
        if (digit != 4) continue;
        if (held[d] > 0.0) {
          lowest = static_cast<unsigned>(d);
          before_lowest = before;
        }
        if (before + held[d] < limit)
          before += held[d];
        else
          digit = static_cast<unsigned>(d);
      }
      if (digit == 4) {
        if (shift == 30) return;  // all of them together hold less
        digit = lowest;           // finer sums may round to less than the coarser one
        before = before_lowest;
      }
      prefix |= digit << shift;
      known |= 3u << shift;
    }
    drop_behind(prefix, before, limit, key, weight);
  }

  // Drops smaller keys than `last`; of those equal to it what follows once `limit` is reached.
  template <class KeyOf, class Weight>
  __device__ void drop_behind(unsigned last, double before, double limit, const KeyOf& key,
                              const Weight& weight) const {
    const auto of_last = [&](float p) { return p > kNever && key(p) == last ? weight(p) : 0.0; };
    sum_of_ranges(of_last, sums.room);
    double running = before;
    for (int w = 0; w < warp(); ++w) running += sums.room[w];
    for (int from = range_begin(warp()); from < range_begin(warp() + 1); from += 32) {
      const int i = from + lane();
      const bool here = i < range_begin(warp() + 1) && values[i] > kNever;
      const float p = here ? values[i] : kNever;
      const double w = of_last(p);
      const double upto = running + inclusive(w);
      if (here && (key(p) < last || (key(p) == last && !(upto - w < limit)))) values[i] = kNever;
      running = shuffle(upto, 31);
    }
    sync_block();
  }

  float* values;
  int length, thread, threads;
  const BlockSums& sums;
};

// Writes every position's x and kind; returns whether any takes part in the softmax, and the largest x.
__device__ inline bool read_row(const SampleCall& c, const RowRules& r, int row, const BlockSums& sums,
                                float* largest) {
  OFAKERN_SHARED(unsigned, bits, 4 * kPieceWords);
  const Marks marks = {bits, bits + kPieceWords, bits + 2 * kPieceWords, bits + 3 * kPieceWords};
  float most = kNever;
  double given = 0.0;
  for (int lo = 0; lo < r.length; lo += kPiece) {
    if (r.flagged) Marker(c.step, r, lo, marks).run();
    for (int at = static_cast<int>(threadIdx.x); at < kPiece && lo + at < r.length;
         at += static_cast<int>(blockDim.x)) {
      const Position p = position_at(c.step, r, marks, lo, at);
      const i64 place = row * c.longest + lo + at;
      const bool wanted =
          r.forced < 0 ? p.plain || p.offered : p.counts && p.token == r.forced && p.token != c.step.pad;
      c.values[place] = p.x;
      c.kinds[place] = !wanted ? 0 : (r.flagged && (r.forced >= 0 || p.offered) ? kOffered : kPlain);
      given += p.counts ? 1.0 : 0.0;
      most = fmaxf(most, p.x);
    }
    sync_block();
  }
  *largest = sums.largest(most);
  return sums.sum(given) > 0.0;
}

// From x to log-probabilities with all rules.
__device__ inline void score_row(const SampleCall& c, const RowRules& r, int row, double log_sum) {
  for (int i = static_cast<int>(threadIdx.x); i < r.length; i += static_cast<int>(blockDim.x)) {
    const i64 place = row * c.longest + i;
    float p = kNever;
    if (c.kinds[place] == kPlain) p = plain(c.values[place], log_sum);
    if (c.kinds[place] == kOffered) p = touched(c.step, r, token_at(c.step, r, i), c.values[place], log_sum);
    c.values[place] = p;
  }
  sync_block();
}

__global__ void __launch_bounds__(32 * kMostWarps) sample_rows(const SampleCall c) {
  OFAKERN_SHARED(double, room, 4 * kMostWarps);
  OFAKERN_SHARED(float, largest_room, kMostWarps);
  OFAKERN_SHARED(int, found, 1);
  const int row = static_cast<int>(blockIdx.x);
  const BlockSums sums = {room, largest_room};
  const auto leave = [&](int token, float log_prob) {
    if (threadIdx.x != 0) return;
    c.tokens[row] = token;
    c.log_probs[row] = log_prob;
  };
  if (!is_live(c.step, row)) return leave(-1, kNever);
  const RowRules r = rules_of(c.step, row);
  if (r.bad_state) return leave(-2 - static_cast<int>(kBadState), NAN);
  float largest;
  if (!read_row(c, r, row, sums, &largest)) return leave(-1, kNever);
  float* values = c.values + row * c.longest;
  const float from = largest == kNever ? 0.0f : largest;
  double sum = 0.0;
  for (int i = static_cast<int>(threadIdx.x); i < r.length; i += static_cast<int>(blockDim.x))
    sum += static_cast<double>(exp_of(values[i] - from));
  const double log_sum = log(sums.sum(sum)) + static_cast<double>(largest);
  if (!(log_sum - log_sum == 0)) return leave(-2 - static_cast<int>(kBadLogits), NAN);
  score_row(c, r, row, log_sum);
  const Candidates all(values, r.length, sums);
  if (all.count() == 0.0) return leave(-1, kNever);
  const float top_p = entry(c.top_p, row, 1.0f), min_p = entry(c.min_p, row, 0.0f);
  const float typical_p = entry(c.typical_p, row, 1.0f);
  all.keep_top_k(entry(c.top_k, row, 0));
  if (top_p < 1) all.keep_nucleus(top_p);
  if (min_p > 0) all.keep_probable(min_p);
  if (typical_p < 1) all.keep_typical(typical_p);
  const int position = all.draw(c.uniforms[row], room, found);
  leave(token_at(c.step, r, position), values[position]);
}

// Threads follow from the vocabulary alone, for sums are divided among them.
unsigned threads_for(i64 vocabulary) { return vocabulary >= 8192 ? 1024 : (vocabulary >= 1024 ? 256 : 64); }

i64 rows_of(const SampleInputs& in) { return in.uniforms.shape[0]; }
i64 values_bytes(const SampleInputs& in) { return (rows_of(in) * longest_row(in.step) * 4 + 255) / 256 * 256; }

}  // namespace

std::int64_t sample_step_workspace_cuda(const SampleInputs& in) {
  return values_bytes(in) + rows_of(in) * longest_row(in.step);
}

void sample_step_cuda(const SampleInputs& in, const TensorView& tokens, const TensorView& log_probs,
                      const TensorView& workspace, Stream stream) {
  if (rows_of(in) == 0) return;
  SampleCall c = {};
  c.step = step_call(in.step);
  c.uniforms = in.uniforms.as<const float>();
  c.top_k = in.top_k.as<const int>();
  c.top_p = in.top_p.as<const float>();
  c.typical_p = in.typical_p.as<const float>();
  c.min_p = in.min_p.as<const float>();
  c.tokens = tokens.as<int>();
  c.log_probs = log_probs.as<float>();
  c.values = workspace.as<float>();
  c.kinds = workspace.as<std::uint8_t>() + values_bytes(in);
  c.longest = longest_row(in.step);
  const Grid grid{dim3(static_cast<unsigned>(rows_of(in))), dim3(threads_for(in.step.vocabulary))};
  launch<sample_rows>(grid, stream, c);
}

}  // namespace ofakern

// Compiled once per instruction set; see core/isa.h.
#include "core/arena.h"
#include "core/pack.h"
#include "core/parallel.h"
#include "core/with_type.h"
#include "ops/gathered_linear/gathered_linear.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// Weight rows and hidden rows whose products are summed at once: as many accumulators as registers allow.
#if defined(__AVX512F__)
constexpr int kTokens = 4, kRows = 4;
#elif defined(__AVX2__)
constexpr int kTokens = 2, kRows = 4;
#else
constexpr int kTokens = 2, kRows = 2;
#endif

// out[r][t] = x row r · weight row t, both over `depth`; x rows are f32, `ldx` apart, zero from depth on.
template <class T, int R, int N>
OFAKERN_LOCAL void dot_block(const float* x, i64 ldx, const T* const* w, i64 depth, float* const* out) {
  Vec sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < N; ++t) sum[r][t] = vzero();
  i64 d = 0;
  for (; d + kWidth <= depth; d += kWidth) {
    Vec weight[N];
    for (int t = 0; t < N; ++t) weight[t] = vload_as(w[t] + d);
    for (int r = 0; r < R; ++r) {
      const Vec row = vload(x + r * ldx + d);
      for (int t = 0; t < N; ++t) sum[r][t] = vfma(row, weight[t], sum[r][t]);
    }
  }
  if (d < depth) {
    Vec weight[N];
    for (int t = 0; t < N; ++t) weight[t] = vload_partial(w[t] + d, static_cast<int>(depth - d));
    for (int r = 0; r < R; ++r) {
      const Vec row = vload(x + r * ldx + d);
      for (int t = 0; t < N; ++t) sum[r][t] = vfma(row, weight[t], sum[r][t]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < N; ++t) out[r][t] = hsum(sum[r][t]);
}

template <class T, int N>
OFAKERN_LOCAL void dot_rows(int rows, const float* x, i64 ldx, const T* const* w, i64 depth, float* const* out) {
  switch (rows) {
    case 1:
      return dot_block<T, 1, N>(x, ldx, w, depth, out);
    case 2:
      return dot_block<T, 2, N>(x, ldx, w, depth, out);
#if defined(__AVX2__)
    case 3:
      return dot_block<T, 3, N>(x, ldx, w, depth, out);
#endif
    default:
      return dot_block<T, kRows, N>(x, ldx, w, depth, out);
  }
}

template <class T>
OFAKERN_LOCAL void dot_tokens(int tokens, int rows, const float* x, i64 ldx, const T* const* w, i64 depth,
                              float* const* out) {
  switch (tokens) {
    case 1:
      return dot_rows<T, 1>(rows, x, ldx, w, depth, out);
#if defined(__AVX512F__)
    case 2:
      return dot_rows<T, 2>(rows, x, ldx, w, depth, out);
    case 3:
      return dot_rows<T, 3>(rows, x, ldx, w, depth, out);
#endif
    default:
      return dot_rows<T, kTokens>(rows, x, ldx, w, depth, out);
  }
}

template <class T>
struct Kernel {
  const GatheredLinearInputs& in;
  const GatheredGroups& groups;
  float* values;
  const std::int32_t* row_first;
  float* x;  // the hidden rows in the groups' order, f32
  i64 ldx, depth;

  const T* weight_row(std::int32_t token) const { return in.weight.as<const T>() + token * in.weight.stride[0]; }

  // Tokens [begin, end) of a state for all rows of its group; a few weight rows stay in the first cache while rows go
  // by.
  void task(i64 group, i64 begin, i64 end, const std::int32_t* tokens) const {
    for (i64 t = begin; t < end; t += kTokens) {
      const int n = static_cast<int>(min_of<i64>(kTokens, end - t));
      const T* rows[kTokens];
      for (int i = 0; i < n; ++i) rows[i] = weight_row(tokens[t + i]);
      for (i64 i = t + n; i < min_of<i64>(t + n + kTokens, end); ++i) prefetch_row(weight_row(tokens[i]), depth);
      for (i64 r = groups.group_first[group]; r < groups.group_first[group + 1]; r += kRows) {
        const int m = static_cast<int>(min_of<i64>(kRows, groups.group_first[group + 1] - r));
        float* out[kRows];
        for (int i = 0; i < m; ++i) out[i] = values + row_first[groups.order[r + i]] + t;
        dot_tokens<T>(n, m, x + r * ldx, ldx, rows, depth, out);
      }
    }
  }

  // The first weight rows of a group, which follows the one at work as a rule: groups are small inside a closed set.
  void prefetch_group(i64 group) const {
    if (group >= groups.groups) return;
    const std::int32_t *first = in.first.as<const std::int32_t>(), *tokens = in.tokens.as<const std::int32_t>();
    const std::int32_t state = in.states.as<const std::int32_t>()[groups.order[groups.group_first[group]]];
    const std::int32_t end = min_of(first[state + 1], first[state] + kTokens);
    for (std::int32_t e = first[state]; e < end; ++e) prefetch_row(weight_row(tokens[e]), depth);
  }

  void run(int threads) const {
    const i64 rows = in.hidden.shape[0];
    for (i64 r = 0; r < rows; ++r)
      copy_row(in.hidden.as<const T>() + groups.order[r] * in.hidden.stride[0], depth, x + r * ldx, ldx);
    const std::int32_t *states = in.states.as<const std::int32_t>(), *first = in.first.as<const std::int32_t>();
    parallel_for(groups.task_first[groups.groups], threads, [&](i64 task_number, int) {
      i64 low = 0, high = groups.groups;  // the group whose tasks hold this one
      while (high - low > 1) {
        const i64 middle = (low + high) / 2;
        (groups.task_first[middle] <= task_number ? low : high) = middle;
      }
      // Groups without tokens have no task: the last of equal beginnings is the one that has.
      const std::int32_t state = states[groups.order[groups.group_first[low]]];
      const i64 begin = (task_number - groups.task_first[low]) * kGatheredTokens;
      const i64 end = min_of<i64>(begin + kGatheredTokens, first[state + 1] - first[state]);
      if (begin == 0) prefetch_group(low + 1);
      task(low, begin, end, in.tokens.as<const std::int32_t>() + first[state]);
    });
  }
};

OFAKERN_HOT i64 padded(i64 depth) { return round_up(depth, kWidth) + kWidth; }

}  // namespace

i64 gathered_linear_scratch(const GatheredLinearInputs& in) {
  return in.hidden.shape[0] * padded(in.hidden.shape[1]) * static_cast<i64>(sizeof(float));
}

void gathered_linear(const GatheredLinearInputs& in, const GatheredGroups& groups, float* values,
                     const std::int32_t* row_first, int threads) {
  with_type(in.hidden.dtype, [&](auto type) {
    const i64 depth = in.hidden.shape[1];
    Kernel<decltype(type)>{in, groups, values, row_first, static_cast<float*>(groups.scratch), padded(depth), depth}
        .run(threads);
  });
}

}  // namespace ofakern::OFAKERN_ISA

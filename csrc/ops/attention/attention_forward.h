// Forward pass: for a run of queries of one head, keys go by tile by tile with a running maximum and sum (online
// softmax).
#pragma once

#include "ops/attention/attention_tiles.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// A task packs its keys once and lets this many query rows (over the heads that share them) use the packing.
constexpr i64 kForwardRows = 1024;

template <class T>
struct ForwardScratch {
  using Elem = Packed<T>;
  static constexpr i64 kQueries = Tile<Elem>::kQueries, kStep = Tile<Elem>::kStep, kKeys = Tile<Elem>::kKeys;

  KeySide<T> keys;
  Elem* queries;             // [kQueries, depth]
  float* scores;             // [kStep, kKeys]
  Elem* probabilities;       // [kStep, kKeys]; for f32 the same memory as scores
  float* output;             // [kQueries, columns]
  float *maximum, *sum;      // [kQueries], maximum in units of log2(e)
  float *growth, *tile_sum;  // of this tile: old maximum minus new, sum of probabilities
  float* dropout;            // [kKeys]

  static ForwardScratch take(const Problem<T>& p, i64 span, Arena& arena) {
    ForwardScratch s = {};
    s.keys = KeySide<T>::take(p, span, false, arena);
    s.queries = arena.take<Elem>(kQueries * p.depth);
    s.scores = arena.take<float>(kStep * kKeys);
    s.probabilities =
        sizeof(Elem) == sizeof(float) ? reinterpret_cast<Elem*>(s.scores) : arena.take<Elem>(kStep * kKeys);
    s.output = arena.take<float>(kQueries * p.columns);
    s.maximum = arena.take<float>(kQueries);
    s.sum = arena.take<float>(kQueries);
    s.growth = arena.take<float>(kQueries);
    s.tile_sum = arena.take<float>(kQueries);
    s.dropout = arena.take<float>(kKeys);
    return s;
  }
};

// Turns row r of the step's dot products into unnormalised probabilities (Elem, zero where masked), and moves the
// maximum of query row q. `padded` vectors are written.
template <int TERMS, class T>
OFAKERN_LOCAL void softmax_row(const Problem<T>& p, const TilePlan<T>& plan, const RowTables& row, ForwardScratch<T>& s,
                               i64 r, i64 q, int padded, const float* dropout) {
  using Elem = Packed<T>;
  float* scores = s.scores + r * s.kKeys;
  Elem* probabilities = s.probabilities + r * s.kKeys;
  const int begin = plan.begin, end = plan.end;
  if (plan.empty()) {
    zero_row(probabilities, padded * kWidth);
    s.growth[q] = 0.0f;
    s.tile_sum[q] = 0.0f;
    return;
  }
  const Vec scale = vset(p.scale * kLog2e);
  Vec top = vset(-kInfinity);
  for (int v = begin; v < end; ++v) {
    Vec score = score_lanes<TERMS>(plan, row, scores, scale, v);
    if (!plan.whole) score = vselect(mask_range(plan.lo - v * kWidth, plan.hi - v * kWidth), score, vset(-kInfinity));
    vstore(scores + v * kWidth, score);
    top = vmax(top, score);
  }
  const float before = s.maximum[q];
  const float now = max_of(before, hmax(top));
  const float reference = now == -kInfinity ? 0.0f : now;
  s.maximum[q] = now;
  s.growth[q] = before - reference;

  const Vec shift = vset(reference);
  Vec total = vzero();
  for (int v = 0; v < begin; ++v) vstore_as(probabilities + v * kWidth, vzero());
  for (int v = begin; v < end; ++v) {
    Vec probability = vexp2_for(vsub(vload(scores + v * kWidth), shift), probabilities);
    total = vadd(total, probability);
    if (dropout != nullptr) probability = vmul(probability, vload(dropout + v * kWidth));
    vstore_as(probabilities + v * kWidth, probability);
  }
  for (int v = end; v < padded; ++v) vstore_as(probabilities + v * kWidth, vzero());
  s.tile_sum[q] = hsum(total);
}

// Applies the rows' new maxima to what was accumulated under the old ones.
template <class T>
OFAKERN_LOCAL void rescale_rows(const Problem<T>& p, ForwardScratch<T>& s, i64 first, i64 rows) {
  alignas(64) float factors[ForwardScratch<T>::kStep];
  for (i64 r = 0; r < rows; r += kWidth) {
    const Vec factor = vexp2(vload(s.growth + first + r));
    vstore(factors + r, factor);
    vstore(s.sum + first + r, vfma(vload(s.sum + first + r), factor, vload(s.tile_sum + first + r)));
  }
  for (i64 r = 0; r < rows; ++r) {
    if (factors[r] == 1.0f) continue;
    const Vec factor = vset(factors[r]);
    float* output = s.output + (first + r) * p.columns;
    for (i64 x = 0; x < p.columns; x += kWidth) vstore(output + x, vmul(vload(output + x), factor));
  }
}

// Writes out = head_scale * output / sum and lse for one row.
template <class T>
OFAKERN_LOCAL void finish_row(const Problem<T>& p, const ForwardScratch<T>& s, i64 head, i64 i, i64 r, T* out,
                              float* lse) {
  const bool empty = p.visible[i].empty();
  const float head_scale = p.head_scale == nullptr ? 1.0f : p.head_scale[head];
  const Vec factor = vset(empty ? 0.0f : head_scale / s.sum[r]);
  const float* output = s.output + r * p.columns;
  T* row = out + (i * p.heads + head) * p.value_width;
  for (i64 x = 0; x < p.value_width; x += kWidth)
    vstore_n(row + x, empty ? vzero() : vmul(vload(output + x), factor), p.value_width - x);
  lse[i * p.heads + head] = empty ? -kInfinity : s.maximum[r] * kLn2 + __builtin_logf(s.sum[r]);
}

// Query rows [q, q + rows) of the block against one tile of keys.
template <int TERMS, class T>
OFAKERN_LOCAL void forward_step(const Problem<T>& p, ForwardScratch<T>& s, TilePlan<T>& plan, i64 tile, i64 sample,
                                i64 head, i64 first, i64 q, i64 rows) {
  using Elem = Packed<T>;
  constexpr i64 kKeys = ForwardScratch<T>::kKeys;
  const i64 keys = s.keys.tile_keys(tile), gemm_rows = round_up(rows, Gemm<Elem>::kRows);
  const i64 padded_keys = round_up(keys, max_of<i64>(Gemm<Elem>::kDepth, kWidth));
  gemm(gemm_rows, round_up(keys, Gemm<Elem>::kColumns), p.depth, s.queries + q * p.depth, p.depth,
       KeySide<T>::transposed(s.keys.k_transposed, tile, p.depth), s.scores, kKeys, false);
  for (i64 r = 0; r < rows; ++r) {
    const i64 i = first + q + r;
    plan.set(p, s.keys, tile, i);
    const float* dropout = nullptr;
    if (p.dropout && !plan.empty()) {
      dropout_factors(p, sample, head, i, s.keys.first + tile * kKeys, padded_keys, s.dropout);
      dropout = s.dropout;
    }
    softmax_row<TERMS>(p, plan, row_tables(p, head, i), s, r, q + r, static_cast<int>(padded_keys / kWidth), dropout);
  }
  zero_row(s.probabilities + rows * kKeys, (gemm_rows - rows) * kKeys);
  rescale_rows(p, s, q, round_up(rows, kWidth));
  gemm(gemm_rows, p.columns, padded_keys, s.probabilities, kKeys, KeySide<T>::rows(s.keys.v_rows, tile, p.columns),
       s.output + q * p.columns, p.columns, true);
}

// A block of at most kQueries rows of one head against all keys they see.
template <int TERMS, class T>
OFAKERN_LOCAL void forward_rows(const Problem<T>& p, ForwardScratch<T>& s, i64 sample, i64 head, i64 first, i64 rows,
                                T* out, float* lse) {
  constexpr i64 kKeys = ForwardScratch<T>::kKeys, kStep = ForwardScratch<T>::kStep;
  static_assert(kStep % kWidth == 0, "the rows' state is updated by whole vectors");
  const i64 padded_rows = round_up(rows, kStep);
  const Interval hull = hull_of(p, first, rows);
  for (i64 r = 0; r < padded_rows; ++r) {
    s.maximum[r] = -kInfinity;
    s.sum[r] = s.growth[r] = s.tile_sum[r] = 0.0f;
  }
  if (!hull.empty()) {
    pack_queries(p, head, first, rows, s.queries);
    zero_row(s.output, padded_rows * p.columns);
    TilePlan<T> plan;
    for (i64 tile = (hull.lo - s.keys.first) / kKeys; tile * kKeys < hull.hi - s.keys.first; ++tile)
      for (i64 q = 0; q < rows; q += kStep)
        forward_step<TERMS>(p, s, plan, tile, sample, head, first, q, min_of(kStep, rows - q));
  }
  for (i64 r = 0; r < rows; ++r) finish_row(p, s, head, first + r, r, out, lse);
}

// A task: some consecutive queries of one sample, for the heads that share one key head.
struct ForwardTask {
  std::int32_t sample, first, count;
};

template <class T>
OFAKERN_LOCAL i64 forward_chunk_rows(const Problem<T>& p, i64 queries) {
  constexpr i64 kQueries = Tile<Packed<T>>::kQueries;
  const i64 target = max_of<i64>(kQueries, kForwardRows / p.group());
  return max_of<i64>(kQueries, round_up(ceil_div(queries, ceil_div(queries, target)), kQueries));
}

// Fills `tasks` (or only counts, when null). Depends on shapes only.
template <class T>
OFAKERN_LOCAL i64 forward_tasks(const Problem<T>& p, ForwardTask* tasks) {
  i64 count = 0;
  for (i64 s = 0; s < p.samples; ++s) {
    const i64 begin = p.q_offsets[s], end = p.q_offsets[s + 1];
    if (begin == end) continue;
    const i64 rows = forward_chunk_rows(p, end - begin);
    for (i64 first = begin; first < end; first += rows, ++count)
      if (tasks != nullptr)
        tasks[count] = {static_cast<std::int32_t>(s), static_cast<std::int32_t>(first),
                        static_cast<std::int32_t>(min_of(rows, end - first))};
  }
  return count;
}

template <class T>
struct ForwardMemory {
  ForwardTask* tasks;
  i64 task_count;
  char* threads;
  i64 bytes_per_thread;

  static ForwardMemory take(Problem<T>& p, int threads, Arena& arena) {
    ForwardMemory memory = {};
    take_reversed_tables(p, arena);
    memory.task_count = forward_tasks(p, nullptr);
    memory.tasks = arena.take<ForwardTask>(memory.task_count);
    Arena one(nullptr);
    ForwardScratch<T>::take(p, p.max_span(), one);
    memory.bytes_per_thread = round_up(one.used(), 4096) + 64;  // + 64: threads must not meet in the same cache sets
    memory.threads = arena.take<char>(memory.bytes_per_thread * threads);
    return memory;
  }
};

template <int TERMS, class T>
OFAKERN_LOCAL void forward_task(const Problem<T>& p, ForwardScratch<T>& s, ForwardTask task, i64 key_head, T* out,
                                float* lse) {
  constexpr i64 kQueries = ForwardScratch<T>::kQueries;
  s.keys.pack(p, key_head, hull_of(p, task.first, task.count), false);
  for (i64 head = key_head * p.group(); head < (key_head + 1) * p.group(); ++head)
    for (i64 r = 0; r < task.count; r += kQueries)
      forward_rows<TERMS>(p, s, task.sample, head, task.first + r, min_of(kQueries, task.count - r), out, lse);
}

template <class T>
OFAKERN_LOCAL void forward(const AttentionInputs& in, const TensorView& out, const TensorView& lse, void* workspace,
                           int threads) {
  Problem<T> p = make_problem<T>(in);
  Arena arena(workspace);
  const ForwardMemory<T> memory = ForwardMemory<T>::take(p, threads, arena);
  forward_tasks(p, memory.tasks);
  reverse_tables(p, threads);
  const i64 span = p.max_span();
  parallel_for(memory.task_count * p.key_heads, threads, [&](i64 index, int thread) {
    const ForwardTask task = memory.tasks[index / p.key_heads];
    const i64 key_head = index % p.key_heads;
    Arena own(memory.threads + memory.bytes_per_thread * thread);
    ForwardScratch<T> scratch = ForwardScratch<T>::take(p, span, own);
    const AmxTiles tiles;
    const auto run = p.term_count == 0   ? forward_task<0, T>
                     : p.term_count == 1 ? forward_task<1, T>
                                         : forward_task<2, T>;
    run(p, scratch, task, key_head, out.as<T>(), lse.as<float>());
  });
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

// Forward pass: for a run of queries of one head, keys go by tile by tile with a running maximum and sum (online
// softmax).
#pragma once

#include "ops/attention/attention_shared.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// A task packs its keys once and lets this many query rows (over the heads that share them) use the packing.
constexpr i64 kForwardRows = 1024;

// A row may hold probabilities of up to this much (a power of two) before its reference is moved.
constexpr float kRowLimit = 4294967296.0f;

// A row's first reference is the maximum of this many vectors of scores: nearly as good as that of the whole tile.
constexpr int kGlance = 4;

template <class T>
struct ForwardMember : Member {
  using Elem = Packed<T>;
  KeySide<T> keys;
  Elem* queries;      // [kQueries, depth]
  float* output;      // [kQueries, columns]
  float* reference;   // [kQueries]: what probabilities are relative to, in units of log2(e)
  float* sum;         // [kQueries, kWidth]: lane by lane
  RowTables* tables;  // [kQueries]
  Interval* seen;     // [kQueries / kStep]: keys that a step's rows see
  bool* alike;        // [kQueries]: the row sees what the row before it sees, with the same terms
};

template <class T>
struct ForwardScratch {
  using Elem = Packed<T>;
  static constexpr i64 kQueries = Tile<Elem>::kQueries, kStep = Tile<Elem>::kStep, kKeys = Tile<Elem>::kKeys;
  // Probabilities take the place of their scores: a row of them, with a row of scores as its stride.
  static constexpr i64 kRowStride = kKeys * static_cast<i64>(sizeof(float) / sizeof(Elem));

  ForwardMember<T> members[kTogether];
  i64 member_count;
  PositionSide<T> positions;
  float* scores;   // [kStep, kKeys]
  float* again;    // [Gemm::kRows, kKeys]: scores of a row that has to be done twice
  float* dropout;  // [kKeys]

  Elem* probabilities(i64 row) const { return reinterpret_cast<Elem*>(scores) + row * kRowStride; }

  static ForwardScratch take(const Problem<T>& p, i64 span, Arena& arena) {
    ForwardScratch s = {};
    for (i64 m = 0; m < p.together; ++m) {
      ForwardMember<T>& member = s.members[m];
      member.keys = KeySide<T>::take(p, span, false, arena);
      member.queries = arena.take<Elem>(kQueries * p.depth);
      member.output = arena.take<float>(kQueries * p.columns);
      member.reference = arena.take<float>(kQueries);
      member.sum = arena.take<float>(kQueries * kWidth);
      member.tables = arena.take<RowTables>(kQueries);
      member.seen = arena.take<Interval>(ceil_div(kQueries, kStep));
      member.alike = arena.take<bool>(kQueries);
    }
    s.positions = PositionSide<T>::take(p, span, false, arena);
    s.scores = arena.take<float>(kStep * kKeys);
    s.again = arena.take<float>(Gemm<Elem>::kRows * kKeys);
    s.dropout = arena.take<float>(kKeys);
    return s;
  }
};

// One row of a step on its way through a tile.
template <class T>
struct ForwardRow {
  const Problem<T>& p;
  const TilePlan<T>& plan;
  RowTables tables;
  const float* dropout;  // factors of the tile's keys, or null
  Packed<T>* probabilities;
  int from, to;  // vectors that the step takes

  Interval keys() const { return {from * kWidth, to * kWidth}; }
};

// Scores minus `shift` of vector v, -inf where the row sees nothing.
template <int TERMS, class T>
OFAKERN_HOT Vec visible_scores(const ForwardRow<T>& row, const float* products, Vec scale, Vec shift, int v) {
  const Vec score = score_lanes<TERMS>(row.plan, row.tables, products, scale, shift, v);
  return row.plan.whole ? score : vselect(row.plan.lanes(v), score, vset(-kInfinity));
}

// The largest score of vectors up to `end`.
template <int TERMS, class T>
OFAKERN_LOCAL float row_maximum(const ForwardRow<T>& row, const float* products, int end) {
  const Vec scale = vset(row.p.scale * kLog2e);
  Vec top = vset(-kInfinity);
  for (int v = row.plan.begin; v < end; ++v) top = vmax(top, visible_scores<TERMS>(row, products, scale, vzero(), v));
  return hmax(top);
}

// Probabilities 2^score(v) of vectors [from, to), all with the terms that the caller's `score` adds; sums to `total`.
template <bool DROPOUT, class T, class Score>
OFAKERN_HOT Vec exponentiate_run(const ForwardRow<T>& row, int from, int to, Vec total, const Score& score) {
  Packed<T>* probabilities = row.probabilities;
#pragma GCC unroll 4
  for (int v = from; v < to; ++v) {
    Vec probability = vexp2_for(score(v), probabilities);
    total = vadd(total, probability);
    if (DROPOUT) probability = vmul(probability, vload(row.dropout + v * kWidth));
    vstore_as(probabilities + v * kWidth, probability);
  }
  return total;
}

// Writes probabilities relative to `reference`, zero where the row sees nothing, and returns their sums. `products` may
// be where probabilities go.
template <int TERMS, class T>
OFAKERN_HOT Vec exponentiate(const ForwardRow<T>& row, const float* products, float reference) {
  const Vec scale = vset(row.p.scale * kLog2e), shift = vset(reference);
  const int begin = row.plan.begin, end = row.plan.end;
  Vec total = vzero();
  const auto any_score = [&](int v) { return visible_scores<TERMS>(row, products, scale, shift, v); };
  if (row.dropout != nullptr) {
    total = exponentiate_run<true>(row, begin, end, total, any_score);
  } else if (TERMS <= 1 && row.plan.whole) {
    // The usual row, without a question per vector: before its segment, inside it, behind it.
    const auto& term = row.plan.terms[0];
    const bool none = TERMS == 0 || term.begin >= term.end;
    const int from = none ? end : term.begin, to = none ? end : term.end;
    const Vec less = vsub(vzero(), shift);
    const auto product = [&](int v) { return vfma(vload(products + v * kWidth), scale, less); };
    const auto biased = [&](int v) { return vadd(product(v), table_lanes(term, row.tables.table[0], v)); };
    total = exponentiate_run<false>(row, begin, from, total, product);
    total = exponentiate_run<false>(row, from, to, total, biased);
    total = exponentiate_run<false>(row, to, end, total, product);
  } else {
    total = exponentiate_run<false>(row, begin, end, total, any_score);
  }
  for (int v = row.from; v < begin; ++v) vstore_as(row.probabilities + v * kWidth, vzero());
  for (int v = end; v < row.to; ++v) vstore_as(row.probabilities + v * kWidth, vzero());
  return total;
}

// Multiplies what row q has accumulated by 2^growth.
template <class T>
OFAKERN_LOCAL void rescale_row(const Problem<T>& p, ForwardMember<T>& s, i64 q, float growth) {
  const Vec factor = vexp2(vset(growth));
  float *output = s.output + q * p.columns, *sum = s.sum + q * kWidth;
  vstore(sum, vmul(vload(sum), factor));
  for (i64 x = 0; x < p.columns; x += kWidth) vstore(output + x, vmul(vload(output + x), factor));
}

// q.k of `rows` rows from row q of the member's block on, with some keys of one tile; onto the positions'
// products where they are made apart.
template <class T>
OFAKERN_HOT void multiply_queries(const Problem<T>& p, const ForwardScratch<T>& s, const ForwardMember<T>& member,
                                  i64 tile, Interval keys, i64 q, i64 rows, float* scores) {
  gemm(rows, keys.hi - keys.lo, p.depth, member.queries + q * p.depth, p.depth,
       member.keys.transposed(member.keys.k_transposed, tile, p.depth, keys.lo), scores + keys.lo, s.kKeys,
       s.positions.onto(q).from(0, keys.lo));
}

// Row r of the step, row q of the block: dot products become probabilities, and their sum is added to the row's.
//
// Probabilities are relative to the maximum of the first scores that the row saw: any reference gives the same result,
// and one that stays spares a pass over the scores. It moves, as in an online softmax, only when a sum grows beyond
// kRowLimit; the dot products, gone by then, are computed again.
template <int TERMS, class T>
OFAKERN_HOT void softmax_row(const ForwardRow<T>& row, ForwardScratch<T>& s, ForwardMember<T>& member, i64 r, i64 q) {
  constexpr i64 kRows = Gemm<Packed<T>>::kRows;
  const float* products = s.scores + r * s.kKeys;
  float* sum = member.sum + q * kWidth;
  const float before = member.reference[q];
  const bool fresh = before == -kInfinity;
  const float reference =
      fresh ? row_maximum<TERMS>(row, products, min_of(row.plan.begin + kGlance, row.plan.end)) : before;
  if (reference != -kInfinity) {
    const Vec total = exponentiate<TERMS>(row, products, reference);
    if (!vany_above(total, kRowLimit)) {
      member.reference[q] = reference;
      vstore(sum, vadd(vload(sum), total));
      return;
    }
    const i64 first = q / kRows * kRows;
    multiply_queries(row.p, s, member, row.plan.tile, row.keys(), first, kRows, s.again);
    products = s.again + (q - first) * s.kKeys;
  }
  const float top = max_of(reference, row_maximum<TERMS>(row, products, row.plan.end));
  if (!fresh) rescale_row(row.p, member, q, before - top);
  member.reference[q] = top;
  // Scores that are all -inf leave no reference; they count for nothing.
  const Vec total = exponentiate<TERMS>(row, products, top == -kInfinity ? 0.0f : top);
  vstore(sum, vadd(vload(sum), total));
}

// Writes out = head_scale * output / sum and lse for row r of the block.
template <class T>
OFAKERN_LOCAL void finish_row(const Problem<T>& p, const ForwardMember<T>& member, i64 head, i64 r, T* out,
                              float* lse) {
  const i64 i = member.block_first + r;
  const bool empty = p.visible[i].empty();
  const float head_scale = p.head_scale == nullptr ? 1.0f : p.head_scale[head];
  const float sum = hsum(vload(member.sum + r * kWidth));
  const Vec factor = vset(empty ? 0.0f : head_scale / sum);
  const float* output = member.output + r * p.columns;
  T* row = out + (i * p.heads + head) * p.value_width;
  for (i64 x = 0; x < p.value_width; x += kWidth)
    vstore_n(row + x, empty ? vzero() : vmul(vload(output + x), factor), p.value_width - x);
  lse[i * p.heads + head] = empty ? -kInfinity : member.reference[r] * kLn2 + __builtin_logf(sum);
}

// Query rows [q, q + rows) of a member's block against one tile of keys. Behind the last one their results are written,
// a row here and a row there: they are asked for ahead.
template <int TERMS, class T>
OFAKERN_LOCAL void forward_step(const Problem<T>& p, ForwardScratch<T>& s, ForwardMember<T>& member, TilePlan<T>& plan,
                                i64 tile, i64 head, i64 q, i64 rows, const T* out) {
  using Elem = Packed<T>;
  constexpr i64 kKeys = ForwardScratch<T>::kKeys, kRowStride = ForwardScratch<T>::kRowStride;
  const i64 gemm_rows = round_up(rows, Gemm<Elem>::kRows), first = member.block_first + q;
  const Interval keys = step_keys(member.keys, tile, member.seen[q / ForwardScratch<T>::kStep]);
  if (tile + 1 == member.tile_end)
    for (i64 r = 0; r < rows; ++r) prefetch_row(out + ((first + r) * p.heads + head) * p.value_width, p.value_width);
  if (keys.empty()) return;
  const i64 count = keys.hi - keys.lo;
  multiply_queries(p, s, member, tile, keys, q, gemm_rows, s.scores);
  for (i64 r = 0; r < rows; ++r) {
    const i64 i = first + r;
    if (r == 0 || !member.alike[q + r]) plan.set(p, member.keys, tile, i);
    if (plan.empty()) {
      zero_row(s.probabilities(r) + keys.lo, count);
      continue;
    }
    if (p.dropout) dropout_factors(p, member.sample, head, i, member.keys.first + tile * kKeys, keys.hi, s.dropout);
    const ForwardRow<T> row = {p,
                               plan,
                               member.tables[q + r],
                               p.dropout ? s.dropout : nullptr,
                               s.probabilities(r),
                               static_cast<int>(keys.lo / kWidth),
                               static_cast<int>(keys.hi / kWidth)};
    softmax_row<TERMS>(row, s, member, r, q + r);
  }
  for (i64 r = rows; r < gemm_rows; ++r) zero_row(s.probabilities(r) + keys.lo, count);
  gemm(gemm_rows, p.columns, count, s.probabilities(0) + keys.lo, kRowStride,
       member.keys.rows(member.keys.v_rows, tile, p.columns, keys.lo), member.output + q * p.columns, p.columns, true);
}

// Whether rows i - 1 and i see the same keys, with the same terms.
template <class T>
OFAKERN_HOT bool alike(const Problem<T>& p, i64 i) {
  bool same = p.visible[i - 1] == p.visible[i];
  for (int t = 0; t < p.term_count; ++t) same = same && p.terms[t].same[i - 1] == p.terms[t].same[i];
  return same;
}

template <class T>
OFAKERN_LOCAL void open_block(const Problem<T>& p, ForwardMember<T>& member, i64 head, i64 first, i64 count) {
  member.set_block(p, first, count, member.keys.first);
  for (i64 r = 0; r < member.block_rows; ++r) {
    const i64 i = member.block_first + r;
    member.reference[r] = -kInfinity;
    member.tables[r] = row_tables(p, head, i);
    member.alike[r] = r > 0 && alike(p, i);
  }
  constexpr i64 kStep = ForwardScratch<T>::kStep;
  for (i64 r = 0; r < member.block_rows; r += kStep)
    member.seen[r / kStep] = hull_of(p, member.block_first + r, min_of(kStep, member.block_rows - r));
  zero_row(member.sum, member.block_rows * kWidth);
  if (member.tile_begin == member.tile_end) return;
  pack_queries(p, head, member.block_first, member.block_rows, member.queries);
  zero_row(member.output, round_up(member.block_rows, Gemm<Packed<T>>::kRows) * p.columns);
}

// Rows [first, first + rows) of the task, at most kQueries, of one head against all keys they see.
template <int TERMS, class T>
OFAKERN_LOCAL void forward_block(const Problem<T>& p, ForwardScratch<T>& s, const Chunk& chunk, i64 chunk_row, i64 head,
                                 i64 first, i64 rows, T* out, float* lse) {
  constexpr i64 kStep = ForwardScratch<T>::kStep;
  for (i64 m = 0; m < s.member_count; ++m) open_block(p, s.members[m], head, first, rows);
  const TileRange tiles = tiles_of(s.members, s.member_count);
  if (p.shared() && tiles.begin < tiles.end) s.positions.pack_queries(p, chunk, head, chunk_row + first, rows);
  TilePlan<T> plan;
  for (i64 tile = tiles.begin; tile < tiles.end; ++tile) {
    if (p.shared()) s.positions.multiply(p, rows, tile);
    for (i64 m = 0; m < s.member_count; ++m) {
      ForwardMember<T>& member = s.members[m];
      if (!member.sees(tile)) continue;
      for (i64 q = 0; q < member.block_rows; q += kStep)
        forward_step<TERMS>(p, s, member, plan, tile, head, q, min_of(kStep, member.block_rows - q), out);
    }
  }
  for (i64 m = 0; m < s.member_count; ++m)
    for (i64 r = 0; r < s.members[m].block_rows; ++r) finish_row(p, s.members[m], head, r, out, lse);
}

// A task: some consecutive query rows of a chunk's samples, for the heads that share one key head.
struct ForwardTask {
  Chunk chunk;
  i64 first, count;
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
  for_chunks(p, [&](const Chunk& chunk) {
    if (chunk.q_rows == 0) return;
    const i64 rows = forward_chunk_rows(p, chunk.q_rows);
    for (i64 first = 0; first < chunk.q_rows; first += rows, ++count)
      if (tasks != nullptr) tasks[count] = {chunk, first, min_of(rows, chunk.q_rows - first)};
  });
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
OFAKERN_LOCAL void forward_task(const Problem<T>& p, ForwardScratch<T>& s, const ForwardTask& task, i64 key_head,
                                T* out, float* lse) {
  constexpr i64 kQueries = ForwardScratch<T>::kQueries;
  s.member_count = task.chunk.to - task.chunk.from;
  for (i64 m = 0; m < s.member_count; ++m) {
    ForwardMember<T>& member = s.members[m];
    member.set(p, sample_at(p, task.chunk.from + m), task.first, task.count);
    Interval keys = hull_of(p, member.first, member.rows);
    if (p.shared() && !keys.empty()) keys.lo = p.keys_of(member.sample).lo;
    member.keys.pack(p, key_head, keys, false);
  }
  if (p.shared()) s.positions.pack(p, task.chunk, key_head, false);
  for (i64 head = key_head * p.group(); head < (key_head + 1) * p.group(); ++head)
    for (i64 r = 0; r < task.count; r += kQueries)
      forward_block<TERMS>(p, s, task.chunk, task.first, head, r, min_of(kQueries, task.count - r), out, lse);
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
    const ForwardTask& task = memory.tasks[index / p.key_heads];
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

// Backward pass: probabilities are recomputed from lse; a task owns every query that sees its keys, so each gradient is
// summed by one thread in an order that depends on shapes only.
//
//   dP = dO V^T     P = exp(S - lse)     dS = P * (c * M * dP - D + dlse),  D = rowsum(dO * O)
//   dV^T += dO^T (c M P)     dK^T += Q^T dS     dQ += dS K     dtable[., q - k] += dS
//
// with c the head scale, M the dropout factors. Gradients of keys are kept transposed so that P and dS are the B
// operand of their product, which is the order in which a row's softmax writes them. Samples that share their positions
// (attention_shared.h) have their dS added up tile by tile: dq_pos and dk_pos are products of the sum.
#pragma once

#include "ops/attention/attention_shared.h"

namespace ofakern::OFAKERN_ISA {
namespace {

template <class T>
struct BackwardMember : Member {
  using Elem = Packed<T>;
  KeySide<T> keys;
  float* dk;                  // per tile [depth, kKeys]
  float* dv;                  // per tile [columns, kKeys]
  bool* touched;              // per tile: dk and dv hold sums
  Elem *queries, *queries_t;  // [kQueries, depth], [depth, kQueries]
  Elem *outputs, *outputs_t;  // dO: [kQueries, columns], [columns, kQueries]
  float* dq;                  // [kQueries, depth]
  float *lse2, *delta;        // [kQueries]
  float* dtables[2];          // this sample's and head's reversed table gradients (borrowed)
  float* dhead_scale;         // this sample's and head's (borrowed)
  Vec head_scale_sum;         // of the block

  static BackwardMember take(const Problem<T>& p, i64 span, Arena& arena) {
    constexpr i64 kQueries = Tile<Elem>::kQueries;
    BackwardMember m = {};
    const i64 keys = KeySide<T>::tiles(span) * Tile<Elem>::kKeys;
    m.keys = KeySide<T>::take(p, span, true, arena);
    m.dk = arena.take<float>(keys * p.depth);
    m.dv = arena.take<float>(keys * p.columns);
    m.touched = arena.take<bool>(KeySide<T>::tiles(span));
    m.queries = arena.take<Elem>(kQueries * p.depth);
    m.queries_t = arena.take<Elem>(kQueries * p.depth);
    m.outputs = arena.take<Elem>(kQueries * p.columns);
    m.outputs_t = arena.take<Elem>(kQueries * p.columns);
    m.dq = arena.take<float>(kQueries * p.depth);
    m.lse2 = arena.take<float>(kQueries);
    m.delta = arena.take<float>(kQueries);
    return m;
  }
};

// The gradients of the positions that a task's samples share.
template <class T>
struct PositionGradients {
  using Elem = Packed<T>;
  Elem* queries_t;  // [pos_depth, kQueries]
  float* dk;        // per tile [pos_depth, kKeys]
  bool* touched;    // per tile: dk holds sums
  float* dq;        // [kQueries, pos_depth]

  static PositionGradients take(const Problem<T>& p, i64 span, Arena& arena) {
    PositionGradients g = {};
    if (!p.shared()) return g;
    g.queries_t = arena.take<Elem>(Tile<Elem>::kQueries * p.pos_depth);
    g.dk = arena.take<float>(KeySide<T>::tiles(span) * Tile<Elem>::kKeys * p.pos_depth);
    g.touched = arena.take<bool>(KeySide<T>::tiles(span));
    g.dq = arena.take<float>(Tile<Elem>::kQueries * p.pos_depth);
    return g;
  }
};

template <class T>
struct BackwardScratch {
  using Elem = Packed<T>;
  static constexpr i64 kQueries = Tile<Elem>::kQueries, kStep = Tile<Elem>::kStep, kKeys = Tile<Elem>::kKeys;
  static constexpr int kPair = Gemm<Elem>::kPair;

  BackwardMember<T> members[kTogether];
  i64 member_count;
  PositionSide<T> positions;
  PositionGradients<T> dpositions;
  std::uint32_t* units;      // interleaved rows on their way to being transposed
  float *scores, *dscores;   // [kQueries, kKeys]: S then c M P;  dP then dS
  Elem *p_pairs, *ds_pairs;  // [kQueries / kPair, kKeys] pairs; for f32 scores and dscores themselves
  Elem* ds_rows;             // [kQueries, kKeys]; likewise
  float* dropout;            // [kKeys]

  static BackwardScratch take(const Problem<T>& p, i64 span, Arena& arena) {
    constexpr bool kSame = sizeof(Elem) == sizeof(float);
    BackwardScratch s = {};
    for (i64 m = 0; m < p.together; ++m) s.members[m] = BackwardMember<T>::take(p, span, arena);
    s.positions = PositionSide<T>::take(p, span, true, arena);
    s.dpositions = PositionGradients<T>::take(p, span, arena);
    s.units = arena.take<std::uint32_t>(kQueries / kPair * max_of(max_of(p.depth, p.columns), p.pos_depth));
    s.scores = arena.take<float>(kQueries * kKeys);
    s.dscores = arena.take<float>(kQueries * kKeys);
    s.p_pairs = kSame ? reinterpret_cast<Elem*>(s.scores) : arena.take<Elem>(kQueries * kKeys);
    s.ds_pairs = kSame ? reinterpret_cast<Elem*>(s.dscores) : arena.take<Elem>(kQueries * kKeys);
    s.ds_rows = kSame ? reinterpret_cast<Elem*>(s.dscores) : arena.take<Elem>(kQueries * kKeys);
    s.dropout = arena.take<float>(kKeys);
    return s;
  }

  // P and dS as B operands: row-major within the tile, panels are column ranges.
  static Panels<Elem> pairs(const Elem* data) { return {data, kPanel * kPair, kKeys * kPair}; }
};

// What the backward pass reads of the forward's results and writes.
template <class T>
struct BackwardTensors {
  const T* out;
  const float* lse;
  const T* dout;
  i64 dout_stride[2];
  const float* dlse;  // or null
  T *dq, *dk, *dv, *dq_pos, *dk_pos;
  float *dtables[2], *dhead_scale;
  float* partial_tables[2];              // [samples, heads, rows], reversed
  float* partial_head_scale;             // [samples, heads]
  float *partial_q_pos, *partial_k_pos;  // [rows of all chunks, H or Hk, P], not scaled
};

// Adds dS of vector v to the term's (reversed) gradient table, wherever the row's term applies.
template <class Entries>
OFAKERN_HOT void scatter_lanes(const Entries& entries, float* table, Vec ds, int v) {
  if (entries.scattered) {
    float values[kWidth], chosen[kWidth] = {};
    vstore_masked(chosen, vset(1.0f), mask_or(entries.first[v], entries.second[v]));
    vstore(values, ds);
    for (int l = 0; l < kWidth; ++l)
      if (chosen[l] != 0.0f) table[entries.coords[v * kWidth + l]] += values[l];
    return;
  }
  float *first = table + entries.base[v], *second = table + entries.base_second[v];
  vstore_masked(first, vadd(vload_masked(first, entries.first[v]), ds), entries.first[v]);
  if (!mask_none(entries.second[v]))
    vstore_masked(second, vadd(vload_masked(second, entries.second[v]), ds), entries.second[v]);
}

// One row of S and dP becomes c M P and dS, in place; everything outside the row's keys becomes 0. `sums`, if any, has
// the row's dS added.
template <int TERMS, class T>
OFAKERN_LOCAL void backward_row(const Problem<T>& p, const TilePlan<T>& plan, const RowTables& row,
                                const RowTables& gradient, float* scores, float* dscores, float* sums,
                                BackwardMember<T>& member, i64 r, int padded, float head_scale, const float* dropout) {
  if (plan.empty()) {
    zero_row(scores, padded * kWidth);
    zero_row(dscores, padded * kWidth);
    return;
  }
  const Vec scale = vset(p.scale * kLog2e), lse2 = vset(member.lse2[r]), delta = vset(member.delta[r]),
            c = vset(head_scale);
  const int begin = plan.begin, end = plan.end;
  zero_row(scores, begin * kWidth);
  zero_row(dscores, begin * kWidth);
  Vec sum = member.head_scale_sum;
  for (int v = begin; v < end; ++v) {
    const i64 x = v * kWidth;
    Vec probability = vexp2_for(score_lanes<TERMS>(plan, row, scores, scale, lse2, v), member.queries);
    Vec dp = vload(dscores + x);
    if (!plan.whole) {
      const Mask lanes = mask_range(plan.lo - v * kWidth, plan.hi - v * kWidth);
      probability = vselect(lanes, probability, vzero());
      dp = vselect(lanes, dp, vzero());
    }
    Vec kept = probability;
    if (dropout != nullptr) {
      const Vec factor = vload(dropout + x);
      kept = vmul(kept, factor);
      dp = vmul(dp, factor);
    }
    sum = vfma(probability, dp, sum);
    const Vec ds = vmul(probability, vsub(vmul(c, dp), delta));
    vstore(scores + x, vmul(c, kept));
    vstore(dscores + x, ds);
    if (sums != nullptr) vstore(sums + x, vadd(vload(sums + x), ds));
    for (int t = 0; t < TERMS; ++t)
      if (v >= plan.terms[t].begin && v < plan.terms[t].end)
        scatter_lanes(plan.terms[t], const_cast<float*>(gradient.table[t]), ds, v);
  }
  member.head_scale_sum = sum;
  zero_row(scores + end * kWidth, (padded - end) * kWidth);
  zero_row(dscores + end * kWidth, (padded - end) * kWidth);
}

// f32 operands are the rows themselves; bf16 ones are rounded here, dS in both orders.
OFAKERN_HOT void round_rows(BackwardScratch<float>&, i64, i64, i64) {}
OFAKERN_HOT void round_rows(BackwardScratch<f16>&, i64, i64, i64) {}
#if defined(OFAKERN_NATIVE_BF16)
OFAKERN_LOCAL void round_rows(BackwardScratch<bf16>& s, i64 first, i64 rows, i64 padded_keys) {
  for (i64 r = first; r < first + rows; r += 2)
    for (i64 x = 0; x < padded_keys; x += kWidth) {
      const i64 even = r * s.kKeys + x, odd = even + s.kKeys, pair = r * s.kKeys + 2 * x;
      const Vec ds0 = vload(s.dscores + even), ds1 = vload(s.dscores + odd);
      vstore_pairs(s.p_pairs + pair, vload(s.scores + even), vload(s.scores + odd));
      vstore_pairs(s.ds_pairs + pair, ds0, ds1);
      vstore_as(s.ds_rows + even, ds0);
      vstore_as(s.ds_rows + odd, ds1);
    }
}
#else
OFAKERN_HOT void round_rows(BackwardScratch<bf16>&, i64, i64, i64) {}
#endif

// The sums of the samples' dS as operands: f32 ones are the sums themselves, bf16 ones are rounded to where a sample's
// dS was.
template <class Elem>
struct SumOperands {
  const Elem *pairs, *rows;
};
template <class T>
OFAKERN_HOT SumOperands<float> round_sums(BackwardScratch<T>& s, i64, i64) {
  return {s.positions.dscores, s.positions.dscores};
}
#if defined(OFAKERN_NATIVE_BF16)
OFAKERN_LOCAL SumOperands<bf16> round_sums(BackwardScratch<bf16>& s, i64 rows, i64 padded_keys) {
  for (i64 r = 0; r < rows; r += 2)
    for (i64 x = 0; x < padded_keys; x += kWidth) {
      const i64 even = r * s.kKeys + x, odd = even + s.kKeys;
      const Vec ds0 = vload(s.positions.dscores + even), ds1 = vload(s.positions.dscores + odd);
      vstore_pairs(s.ds_pairs + r * s.kKeys + 2 * x, ds0, ds1);
      vstore_as(s.ds_rows + even, ds0);
      vstore_as(s.ds_rows + odd, ds1);
    }
  return {s.ds_pairs, s.ds_rows};
}
#endif

// dst [width, kQueries] = the transpose of the first `rows` rows of src [kQueries, width], by way of `units`.
template <class T>
OFAKERN_LOCAL void transpose_rows(BackwardScratch<T>& s, const Packed<T>* src, i64 rows, i64 width, Packed<T>* dst) {
  interleave(src, width, rows, width, s.units, width);
  transpose_units(s.units, width, rows / s.kPair, width, as_units(dst), s.kQueries / s.kPair);
}

// Packs queries and dO of the member's block, and what of a row does not change from tile to tile.
template <class T>
OFAKERN_LOCAL void open_block(const Problem<T>& p, const BackwardTensors<T>& g, BackwardScratch<T>& s,
                              BackwardMember<T>& member, i64 head, i64 first, i64 count) {
  member.set_block(p, first, count, member.keys.first);
  const i64 rows = member.block_rows, padded = round_up(rows, kRowMultiple);
  pack_queries(p, head, member.block_first, rows, member.queries);
  transpose_rows(s, member.queries, padded, p.depth, member.queries_t);
  for (i64 r = 0; r < padded; ++r) {
    const i64 i = member.block_first + r;
    Packed<T>* packed = member.outputs + r * p.columns;
    if (r >= rows || p.visible[i].empty()) {
      zero_row(packed, p.columns);
      continue;
    }
    const T* out = g.out + (i * p.heads + head) * p.value_width;
    const T* dout = g.dout + i * g.dout_stride[0] + head * g.dout_stride[1];
    copy_row(dout, p.value_width, packed, p.columns);
    Vec delta = vzero();
    for (i64 x = 0; x < p.value_width; x += kWidth)
      delta = vfma(vload_n(out + x, p.value_width - x), vload_n(dout + x, p.value_width - x), delta);
    const float dlse = g.dlse == nullptr ? 0.0f : g.dlse[i * p.heads + head];
    member.delta[r] = hsum(delta) - dlse;
    member.lse2[r] = g.lse[i * p.heads + head] * kLog2e;
  }
  transpose_rows(s, member.outputs, padded, p.columns, member.outputs_t);
  zero_row(member.dq, round_up(rows, Gemm<Packed<T>>::kRows) * p.depth);
  member.head_scale_sum = vzero();
}

// Writes `count` numbers times `factor` as T.
template <class T>
OFAKERN_HOT void store_scaled(const float* src, i64 count, float factor, T* dst) {
  const Vec f = vset(factor);
  for (i64 x = 0; x < count; x += kWidth) vstore_n(dst + x, vmul(vload_n(src + x, count - x), f), count - x);
}

// Writes dq (and a joined dq_pos) of the member's block, and adds its part of dhead_scale.
template <class T>
OFAKERN_LOCAL void close_block(const Problem<T>& p, const BackwardTensors<T>& g, const BackwardMember<T>& member,
                               i64 head) {
  *member.dhead_scale += hsum(member.head_scale_sum);
  for (i64 r = 0; r < member.block_rows; ++r) {
    const i64 token = (member.block_first + r) * p.heads + head;
    const float* dq = member.dq + r * p.depth;
    store_scaled(dq, p.width, p.scale, g.dq + token * p.width);
    if (p.joined > 0) store_scaled(dq + p.width, p.joined, p.scale, g.dq_pos + token * p.joined);
  }
}

// S, dP and from them c M P and dS of query rows [q, q + rows) of a member's block, for one tile of keys. Rows of dq
// are asked for before they are written, behind the last tile.
template <int TERMS, class T>
OFAKERN_LOCAL void backward_step(const Problem<T>& p, BackwardScratch<T>& s, BackwardMember<T>& member,
                                 TilePlan<T>& plan, i64 tile, i64 head, i64 q, i64 rows, const T* dq) {
  using Elem = Packed<T>;
  constexpr i64 kKeys = BackwardScratch<T>::kKeys;
  const i64 padded_keys = round_up(member.keys.tile_keys(tile), max_of<i64>(Gemm<Elem>::kDepth, kWidth));
  const i64 gemm_rows = round_up(rows, Gemm<Elem>::kRows), depth_rows = round_up(rows, Gemm<Elem>::kDepth);
  const Interval keys = step_keys(member.keys, tile, hull_of(p, member.block_first + q, rows));
  const i64 count = keys.hi - keys.lo, start = q * kKeys + keys.lo;
  gemm(gemm_rows, count, p.depth, member.queries + q * p.depth, p.depth,
       member.keys.transposed(member.keys.k_transposed, tile, p.depth, keys.lo), s.scores + start, kKeys,
       s.positions.onto(q).from(0, keys.lo));
  gemm(gemm_rows, count, p.columns, member.outputs + q * p.columns, p.columns,
       member.keys.transposed(member.keys.v_transposed, tile, p.columns, keys.lo), s.dscores + start, kKeys, false);
  const float head_scale = p.head_scale == nullptr ? 1.0f : p.head_scale[head];
  for (i64 r = q; r < q + rows; ++r) {
    const i64 i = member.block_first + r;
    if (tile + 1 == member.tile_end) prefetch_row(dq + (i * p.heads + head) * p.width, p.width);
    plan.set(p, member.keys, tile, i);
    const float* dropout = nullptr;
    if (p.dropout && !plan.empty()) {
      dropout_factors(p, member.sample, head, i, member.keys.first + tile * kKeys, padded_keys, s.dropout);
      dropout = s.dropout;
    }
    RowTables gradient = {};
    for (int t = 0; t < TERMS; ++t)
      gradient.table[t] = member.dtables[t] + (p.terms[t].rows - 1 - p.terms[t].q_coord[i]);
    float* sums = p.shared() ? s.positions.dscores + r * kKeys : nullptr;
    backward_row<TERMS>(p, plan, row_tables(p, head, i), gradient, s.scores + r * kKeys, s.dscores + r * kKeys, sums,
                        member, r, static_cast<int>(padded_keys / kWidth), head_scale, dropout);
  }
  zero_row(s.scores + (q + rows) * kKeys, (depth_rows - rows) * kKeys);
  zero_row(s.dscores + (q + rows) * kKeys, (depth_rows - rows) * kKeys);
  round_rows(s, q, depth_rows, padded_keys);
}

// A member's block against one tile of keys.
template <int TERMS, class T>
OFAKERN_LOCAL void backward_tile(const Problem<T>& p, BackwardScratch<T>& s, BackwardMember<T>& member,
                                 TilePlan<T>& plan, i64 tile, i64 head, const T* dq) {
  using Elem = Packed<T>;
  constexpr i64 kQueries = BackwardScratch<T>::kQueries, kStep = BackwardScratch<T>::kStep,
                kKeys = BackwardScratch<T>::kKeys;
  const i64 rows = member.block_rows, keys = member.keys.tile_keys(tile);
  const i64 gemm_rows = round_up(rows, Gemm<Elem>::kRows), depth_rows = round_up(rows, Gemm<Elem>::kDepth);
  const i64 columns = round_up(keys, Gemm<Elem>::kColumns);
  const i64 padded_keys = round_up(keys, max_of<i64>(Gemm<Elem>::kDepth, kWidth));
  for (i64 q = 0; q < rows; q += kStep)
    backward_step<TERMS>(p, s, member, plan, tile, head, q, min_of(kStep, rows - q), dq);
  gemm(round_up(p.value_width, Gemm<Elem>::kRows), columns, depth_rows, member.outputs_t, kQueries, s.pairs(s.p_pairs),
       member.dv + tile * kKeys * p.columns, kKeys, member.touched[tile]);
  gemm(round_up(p.width + p.joined, Gemm<Elem>::kRows), columns, depth_rows, member.queries_t, kQueries,
       s.pairs(s.ds_pairs), member.dk + tile * kKeys * p.depth, kKeys, member.touched[tile]);
  member.touched[tile] = true;
  gemm(gemm_rows, p.depth, padded_keys, s.ds_rows, kKeys, member.keys.rows(member.keys.k_rows, tile, p.depth),
       member.dq, p.depth, true);
}

// dq_pos and dk_pos of the block and one tile of keys, from the sum of the samples' dS.
template <class T>
OFAKERN_LOCAL void backward_positions(const Problem<T>& p, BackwardScratch<T>& s, i64 rows, i64 tile) {
  using Elem = Packed<T>;
  constexpr i64 kQueries = BackwardScratch<T>::kQueries, kKeys = BackwardScratch<T>::kKeys;
  PositionGradients<T>& g = s.dpositions;
  const i64 keys = s.positions.tile_keys(tile), depth_rows = round_up(rows, Gemm<Elem>::kDepth);
  const i64 padded_keys = round_up(keys, max_of<i64>(Gemm<Elem>::kDepth, kWidth));
  const SumOperands<Elem> sums = round_sums(s, depth_rows, padded_keys);
  gemm(round_up(p.pos_width, Gemm<Elem>::kRows), round_up(keys, Gemm<Elem>::kColumns), depth_rows, g.queries_t,
       kQueries, s.pairs(sums.pairs), g.dk + tile * kKeys * p.pos_depth, kKeys, g.touched[tile]);
  g.touched[tile] = true;
  gemm(round_up(rows, Gemm<Elem>::kRows), p.pos_depth, padded_keys, sums.rows, kKeys,
       KeySide<T>::rows(s.positions.k_rows, tile, p.pos_depth), g.dq, p.pos_depth, true);
}

// The chunk's rows in the partial gradients of the positions.
struct PositionRows {
  i64 q, k;
};

// Rows [first, first + rows) of the samples, at most kQueries, of one head against all keys they see.
template <int TERMS, class T>
OFAKERN_LOCAL void backward_block(const Problem<T>& p, const BackwardTensors<T>& g, BackwardScratch<T>& s,
                                  const Chunk& chunk, PositionRows at, i64 head, i64 first, i64 rows) {
  constexpr i64 kKeys = BackwardScratch<T>::kKeys;
  const i64 depth_rows = round_up(rows, kRowMultiple);
  for (i64 m = 0; m < s.member_count; ++m) open_block(p, g, s, s.members[m], head, first, rows);
  if (p.shared()) {
    s.positions.pack_queries(p, chunk, head, first, rows);
    transpose_rows(s, s.positions.queries, depth_rows, p.pos_depth, s.dpositions.queries_t);
    zero_row(s.dpositions.dq, depth_rows * p.pos_depth);
  }
  const TileRange tiles = tiles_of(s.members, s.member_count);
  TilePlan<T> plan;
  for (i64 tile = tiles.begin; tile < tiles.end; ++tile) {
    if (p.shared()) {
      s.positions.multiply(p, rows, tile);
      zero_row(s.positions.dscores, depth_rows * kKeys);
    }
    for (i64 m = 0; m < s.member_count; ++m)
      if (s.members[m].sees(tile)) backward_tile<TERMS>(p, s, s.members[m], plan, tile, head, g.dq);
    if (p.shared()) backward_positions(p, s, rows, tile);
  }
  for (i64 m = 0; m < s.member_count; ++m) close_block(p, g, s.members[m], head);
  if (p.shared())
    for (i64 r = 0; r < rows; ++r)
      store_scaled(s.dpositions.dq + r * p.pos_depth, p.pos_width, 1.0f,
                   g.partial_q_pos + ((at.q + first + r) * p.heads + head) * p.pos_width);
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

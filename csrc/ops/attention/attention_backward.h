// Backward pass: probabilities are recomputed from lse; a task owns every query that sees its keys, so each gradient is
// summed by one thread in an order that depends on shapes only.
//
//   dP = dO V^T     P = exp(S - lse)     dS = P * (c * M * dP - D + dlse),  D = rowsum(dO * O)
//   dV^T += dO^T (c M P)     dK^T += Q^T dS     dQ += dS K     dtable[., q - k] += dS
//
// with c the head scale, M the dropout factors. Gradients of keys are kept transposed so that P and dS are the B
// operand of their product, which is the order in which a row's softmax writes them.
#pragma once

#include "ops/attention/attention_tiles.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// Samples whose queries see overlapping keys: their gradients of keys are summed by one task.
struct Cluster {
  std::int32_t begin, end;  // in the array of samples sorted by their keys
  Interval keys;
};

template <class T>
struct BackwardScratch {
  using Elem = Packed<T>;
  static constexpr i64 kQueries = Tile<Elem>::kQueries, kStep = Tile<Elem>::kStep, kKeys = Tile<Elem>::kKeys;
  static constexpr int kPair = Gemm<Elem>::kPair;

  KeySide<T> keys;
  float* dk;                  // per tile [depth, kKeys]
  float* dv;                  // per tile [columns, kKeys]
  bool* touched;              // per tile: dk and dv hold sums
  Elem *queries, *queries_t;  // [kQueries, depth], [depth, kQueries]
  Elem *outputs, *outputs_t;  // dO: [kQueries, columns], [columns, kQueries]
  std::uint32_t* units;       // interleaved rows on their way to being transposed
  float *scores, *dscores;    // [kQueries, kKeys]: S then c M P;  dP then dS
  Elem *p_pairs, *ds_pairs;   // [kQueries / kPair, kKeys] pairs; for f32 scores and dscores themselves
  Elem* ds_rows;              // [kQueries, kKeys]; likewise
  float* dq;                  // [kQueries, depth]
  float *lse2, *delta;        // [kQueries]
  float* dropout;             // [kKeys]
  float* dtables[2];          // this sample's and head's reversed table gradients (borrowed)
  float* dhead_scale;         // this sample's and head's (borrowed)

  static BackwardScratch take(const Problem<T>& p, i64 span, Arena& arena) {
    constexpr bool kSame = sizeof(Elem) == sizeof(float);
    BackwardScratch s = {};
    const i64 keys = KeySide<T>::tiles(span) * kKeys;
    s.keys = KeySide<T>::take(p, span, true, arena);
    s.dk = arena.take<float>(keys * p.depth);
    s.dv = arena.take<float>(keys * p.columns);
    s.touched = arena.take<bool>(KeySide<T>::tiles(span));
    s.queries = arena.take<Elem>(kQueries * p.depth);
    s.queries_t = arena.take<Elem>(kQueries * p.depth);
    s.outputs = arena.take<Elem>(kQueries * p.columns);
    s.outputs_t = arena.take<Elem>(kQueries * p.columns);
    s.units = arena.take<std::uint32_t>(kQueries / kPair * max_of(p.depth, p.columns));
    s.scores = arena.take<float>(kQueries * kKeys);
    s.dscores = arena.take<float>(kQueries * kKeys);
    s.p_pairs = kSame ? reinterpret_cast<Elem*>(s.scores) : arena.take<Elem>(kQueries * kKeys);
    s.ds_pairs = kSame ? reinterpret_cast<Elem*>(s.dscores) : arena.take<Elem>(kQueries * kKeys);
    s.ds_rows = kSame ? reinterpret_cast<Elem*>(s.dscores) : arena.take<Elem>(kQueries * kKeys);
    s.dq = arena.take<float>(kQueries * p.depth);
    s.lse2 = arena.take<float>(kQueries);
    s.delta = arena.take<float>(kQueries);
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
  float* partial_tables[2];   // [samples, heads, rows], reversed
  float* partial_head_scale;  // [samples, heads]
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

// One row of S and dP becomes c M P and dS, in place; everything outside the row's keys becomes 0.
template <int TERMS, class T>
OFAKERN_LOCAL void backward_row(const Problem<T>& p, const TilePlan<T>& plan, const RowTables& row,
                                const RowTables& gradient, BackwardScratch<T>& s, i64 r, int padded, float head_scale,
                                const float* dropout, Vec& head_scale_sum) {
  float* scores = s.scores + r * s.kKeys;
  float* dscores = s.dscores + r * s.kKeys;
  if (plan.empty()) {
    zero_row(scores, padded * kWidth);
    zero_row(dscores, padded * kWidth);
    return;
  }
  const Vec scale = vset(p.scale * kLog2e), lse2 = vset(s.lse2[r]), delta = vset(s.delta[r]), c = vset(head_scale);
  const int begin = plan.begin, end = plan.end;
  zero_row(scores, begin * kWidth);
  zero_row(dscores, begin * kWidth);
  Vec sum = head_scale_sum;
  for (int v = begin; v < end; ++v) {
    const i64 x = v * kWidth;
    Vec probability = vexp2_for(score_lanes<TERMS>(plan, row, scores, scale, lse2, v), s.queries);
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
    for (int t = 0; t < TERMS; ++t)
      if (v >= plan.terms[t].begin && v < plan.terms[t].end)
        scatter_lanes(plan.terms[t], const_cast<float*>(gradient.table[t]), ds, v);
  }
  head_scale_sum = sum;
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

// dst [width, kQueries] = the transpose of the first `rows` rows of src [kQueries, width], by way of `units`.
template <class T>
OFAKERN_LOCAL void transpose_rows(BackwardScratch<T>& s, const Packed<T>* src, i64 rows, i64 width, Packed<T>* dst) {
  interleave(src, width, rows, width, s.units, width);
  transpose_units(s.units, width, rows / s.kPair, width, as_units(dst), s.kQueries / s.kPair);
}

// Packs queries and dO of rows [first, first + rows), and what of a row does not change from tile to tile.
template <class T>
OFAKERN_LOCAL void open_rows(const Problem<T>& p, const BackwardTensors<T>& g, BackwardScratch<T>& s, i64 head,
                             i64 first, i64 rows) {
  pack_queries(p, head, first, rows, s.queries);
  const i64 padded = round_up(rows, kRowMultiple);
  transpose_rows(s, s.queries, padded, p.depth, s.queries_t);
  for (i64 r = 0; r < padded; ++r) {
    const i64 i = first + r;
    Packed<T>* packed = s.outputs + r * p.columns;
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
    s.delta[r] = hsum(delta) - dlse;
    s.lse2[r] = g.lse[i * p.heads + head] * kLog2e;
  }
  transpose_rows(s, s.outputs, padded, p.columns, s.outputs_t);
  zero_row(s.dq, round_up(rows, Gemm<Packed<T>>::kRows) * p.depth);
}

// Writes `count` numbers times `factor` as T.
template <class T>
OFAKERN_HOT void store_scaled(const float* src, i64 count, float factor, T* dst) {
  const Vec f = vset(factor);
  for (i64 x = 0; x < count; x += kWidth) vstore_n(dst + x, vmul(vload_n(src + x, count - x), f), count - x);
}

// S, dP and from them c M P and dS of query rows [q, q + rows) of the block, for one tile of keys.
template <int TERMS, class T>
OFAKERN_LOCAL void backward_step(const Problem<T>& p, BackwardScratch<T>& s, TilePlan<T>& plan, i64 tile, i64 sample,
                                 i64 head, i64 first, i64 q, i64 rows, Vec& head_scale_sum) {
  using Elem = Packed<T>;
  constexpr i64 kKeys = BackwardScratch<T>::kKeys;
  const i64 keys = s.keys.tile_keys(tile), columns = round_up(keys, Gemm<Elem>::kColumns);
  const i64 padded_keys = round_up(keys, max_of<i64>(Gemm<Elem>::kDepth, kWidth));
  const i64 gemm_rows = round_up(rows, Gemm<Elem>::kRows), depth_rows = round_up(rows, Gemm<Elem>::kDepth);
  gemm(gemm_rows, columns, p.depth, s.queries + q * p.depth, p.depth,
       s.keys.transposed(s.keys.k_transposed, tile, p.depth), s.scores + q * kKeys, kKeys, false);
  gemm(gemm_rows, columns, p.columns, s.outputs + q * p.columns, p.columns,
       s.keys.transposed(s.keys.v_transposed, tile, p.columns), s.dscores + q * kKeys, kKeys, false);
  const float head_scale = p.head_scale == nullptr ? 1.0f : p.head_scale[head];
  for (i64 r = q; r < q + rows; ++r) {
    const i64 i = first + r;
    plan.set(p, s.keys, tile, i);
    const float* dropout = nullptr;
    if (p.dropout && !plan.empty()) {
      dropout_factors(p, sample, head, i, s.keys.first + tile * kKeys, padded_keys, s.dropout);
      dropout = s.dropout;
    }
    RowTables gradient = {};
    for (int t = 0; t < TERMS; ++t) gradient.table[t] = s.dtables[t] + (p.terms[t].rows - 1 - p.terms[t].q_coord[i]);
    backward_row<TERMS>(p, plan, row_tables(p, head, i), gradient, s, r, static_cast<int>(padded_keys / kWidth),
                        head_scale, dropout, head_scale_sum);
  }
  zero_row(s.scores + (q + rows) * kKeys, (depth_rows - rows) * kKeys);
  zero_row(s.dscores + (q + rows) * kKeys, (depth_rows - rows) * kKeys);
  round_rows(s, q, depth_rows, padded_keys);
}

// A block of at most kQueries rows of one head against all keys they see.
template <int TERMS, class T>
OFAKERN_LOCAL void backward_rows(const Problem<T>& p, const BackwardTensors<T>& g, BackwardScratch<T>& s, i64 sample,
                                 i64 head, i64 first, i64 rows) {
  using Elem = Packed<T>;
  constexpr i64 kQueries = BackwardScratch<T>::kQueries, kStep = BackwardScratch<T>::kStep,
                kKeys = BackwardScratch<T>::kKeys;
  const Interval hull = hull_of(p, first, rows);
  open_rows(p, g, s, head, first, rows);
  const i64 gemm_rows = round_up(rows, Gemm<Elem>::kRows), depth_rows = round_up(rows, Gemm<Elem>::kDepth);
  const i64 last = hull.empty() ? 0 : ceil_div(hull.hi - s.keys.first, kKeys);
  Vec head_scale_sum = vzero();
  TilePlan<T> plan;
  for (i64 tile = hull.empty() ? 0 : (hull.lo - s.keys.first) / kKeys; tile < last; ++tile) {
    const i64 columns = round_up(s.keys.tile_keys(tile), Gemm<Elem>::kColumns);
    const i64 padded_keys = round_up(s.keys.tile_keys(tile), max_of<i64>(Gemm<Elem>::kDepth, kWidth));
    for (i64 q = 0; q < rows; q += kStep)
      backward_step<TERMS>(p, s, plan, tile, sample, head, first, q, min_of(kStep, rows - q), head_scale_sum);
    gemm(round_up(p.value_width, Gemm<Elem>::kRows), columns, depth_rows, s.outputs_t, kQueries, s.pairs(s.p_pairs),
         s.dv + tile * kKeys * p.columns, kKeys, s.touched[tile]);
    gemm(round_up(p.width + p.pos_width, Gemm<Elem>::kRows), columns, depth_rows, s.queries_t, kQueries,
         s.pairs(s.ds_pairs), s.dk + tile * kKeys * p.depth, kKeys, s.touched[tile]);
    s.touched[tile] = true;
    gemm(gemm_rows, p.depth, padded_keys, s.ds_rows, kKeys, s.keys.rows(s.keys.k_rows, tile, p.depth), s.dq, p.depth,
         true);
  }
  *s.dhead_scale += hsum(head_scale_sum);
  for (i64 r = 0; r < rows; ++r) {
    const i64 token = (first + r) * p.heads + head;
    store_scaled(s.dq + r * p.depth, p.width, p.scale, g.dq + token * p.width);
    if (g.dq_pos != nullptr)
      store_scaled(s.dq + r * p.depth + p.width, p.pos_width, p.scale, g.dq_pos + token * p.pos_width);
  }
}

// Gradients of keys [begin, end), which no query sees.
template <class T>
OFAKERN_LOCAL void zero_keys(const Problem<T>& p, const BackwardTensors<T>& g, i64 key_head, i64 begin, i64 end) {
  for (i64 j = begin; j < end; ++j) {
    const i64 token = j * p.key_heads + key_head;
    zero_row(g.dk + token * p.width, p.width);
    zero_row(g.dv + token * p.value_width, p.value_width);
    if (g.dk_pos != nullptr) zero_row(g.dk_pos + token * p.pos_width, p.pos_width);
  }
}

// Writes dk, dv, dk_pos of the task's keys from their transposed sums.
template <class T>
OFAKERN_LOCAL void close_keys(const Problem<T>& p, const BackwardTensors<T>& g, BackwardScratch<T>& s, i64 key_head) {
  constexpr i64 kKeys = BackwardScratch<T>::kKeys;
  const i64 width = max_of(p.depth, p.columns);
  float* rows = reinterpret_cast<float*>(s.units);  // kKeys x width floats do not fit: go by 16 keys
  constexpr i64 kStep = 16;
  for (i64 tile = 0; tile < s.keys.tile_count(); ++tile) {
    if (!s.touched[tile]) {
      const i64 begin = s.keys.first + tile * kKeys;
      zero_keys(p, g, key_head, begin, begin + s.keys.tile_keys(tile));
      continue;
    }
    for (i64 j0 = 0; j0 < s.keys.tile_keys(tile); j0 += kStep) {
      const i64 keys = min_of(kStep, s.keys.tile_keys(tile) - j0);
      const i64 token = (s.keys.first + tile * kKeys + j0) * p.key_heads + key_head;
      transpose_units(as_units(s.dk + tile * kKeys * p.depth + j0), kKeys, p.depth, kStep, as_units(rows), width);
      for (i64 j = 0; j < keys; ++j) {
        store_scaled(rows + j * width, p.width, p.scale, g.dk + (token + j * p.key_heads) * p.width);
        if (g.dk_pos != nullptr)
          store_scaled(rows + j * width + p.width, p.pos_width, p.scale,
                       g.dk_pos + (token + j * p.key_heads) * p.pos_width);
      }
      transpose_units(as_units(s.dv + tile * kKeys * p.columns + j0), kKeys, p.columns, kStep, as_units(rows), width);
      for (i64 j = 0; j < keys; ++j)
        store_scaled(rows + j * width, p.value_width, 1.0f, g.dv + (token + j * p.key_heads) * p.value_width);
    }
  }
}

// Sorts samples by their keys and joins those that overlap. Samples that see nothing stand in the first cluster.
template <class T>
OFAKERN_LOCAL i64 make_clusters(const Problem<T>& p, std::int32_t* order, Cluster* clusters) {
  for (i64 s = 0; s < p.samples; ++s) {
    const Interval range = p.k_range[s].empty() ? Interval{-1, -1} : p.k_range[s];
    i64 at = s;  // insertion: batches come sorted, or nearly so
    for (; at > 0; --at) {
      const Interval other = p.k_range[order[at - 1]];
      if ((other.empty() ? -1 : other.lo) <= range.lo) break;
      order[at] = order[at - 1];
    }
    order[at] = static_cast<std::int32_t>(s);
  }
  i64 count = 0;
  for (std::int32_t at = 0; at < p.samples; ++at) {
    const Interval range = p.k_range[order[at]];
    if (count > 0 && (range.empty() || clusters[count - 1].keys.empty() || range.lo < clusters[count - 1].keys.hi)) {
      Cluster& open = clusters[count - 1];
      open.end = at + 1;
      if (open.keys.empty()) open.keys = range;
      if (!range.empty()) open.keys.hi = max_of(open.keys.hi, range.hi);
    } else {
      clusters[count++] = {at, at + 1, range.empty() ? Interval{0, 0} : range};
    }
  }
  return count;
}

template <class T>
struct BackwardMemory {
  std::int32_t* order;
  Cluster* clusters;
  i64 cluster_count;
  float* partial_tables[2];
  float* partial_head_scale;
  char* threads;
  i64 bytes_per_thread, span;

  // Longest hull over clusters, without memory to sort in: chains of overlapping samples end to end.
  static i64 longest_cluster(const Problem<T>& p) {
    i64 lo = p.keys, hi = 0, longest = 0;
    bool sorted = true;
    Interval open = {0, 0};
    std::int32_t previous = -1;
    for (i64 s = 0; s < p.samples; ++s) {
      const Interval range = p.k_range[s];
      if (range.empty()) continue;
      sorted = sorted && range.lo >= previous;
      previous = range.lo;
      lo = min_of<i64>(lo, range.lo);
      hi = max_of<i64>(hi, range.hi);
      open = open.empty() || range.lo >= open.hi ? range : Interval{open.lo, max_of(open.hi, range.hi)};
      longest = max_of<i64>(longest, open.hi - open.lo);
    }
    return sorted ? longest : max_of<i64>(0, hi - lo);
  }

  static BackwardMemory take(Problem<T>& p, int threads, Arena& arena) {
    BackwardMemory memory = {};
    take_reversed_tables(p, arena);
    memory.order = arena.take<std::int32_t>(p.samples);
    memory.clusters = arena.take<Cluster>(p.samples);
    for (int t = 0; t < p.term_count; ++t)
      memory.partial_tables[t] = arena.take<float>(p.samples * p.heads * p.terms[t].rows);
    memory.partial_head_scale = arena.take<float>(p.samples * p.heads);
    memory.span = longest_cluster(p);
    Arena one(nullptr);
    BackwardScratch<T>::take(p, memory.span, one);
    memory.bytes_per_thread = round_up(one.used(), 4096) + 64;
    memory.threads = arena.take<char>(memory.bytes_per_thread * threads);
    return memory;
  }
};

template <class T>
OFAKERN_LOCAL void backward_sample(const Problem<T>& p, const BackwardTensors<T>& g, BackwardScratch<T>& s, i64 sample,
                                   i64 key_head) {
  const i64 begin = p.q_offsets[sample], end = p.q_offsets[sample + 1];
  const auto run = p.term_count == 0   ? backward_rows<0, T>
                   : p.term_count == 1 ? backward_rows<1, T>
                                       : backward_rows<2, T>;
  for (i64 head = key_head * p.group(); head < (key_head + 1) * p.group(); ++head) {
    const i64 slot = sample * p.heads + head;
    for (int t = 0; t < p.term_count; ++t) {
      s.dtables[t] = g.partial_tables[t] + slot * p.terms[t].rows;
      zero_row(s.dtables[t], p.terms[t].rows);
    }
    s.dhead_scale = g.partial_head_scale + slot;
    *s.dhead_scale = 0.0f;
    for (i64 first = begin; first < end; first += s.kQueries)
      run(p, g, s, sample, head, first, min_of(s.kQueries, end - first));
  }
}

// Sums the samples' partial gradients, in their order.
template <class T>
OFAKERN_LOCAL void reduce_partials(const Problem<T>& p, const BackwardTensors<T>& g, int threads) {
  parallel_for(p.heads, threads, [&](i64 head, int) {
    for (int t = 0; t < p.term_count; ++t) {
      const i64 rows = p.terms[t].rows;
      float* gradient = g.dtables[t] + head * rows;
      zero_row(gradient, rows);
      for (i64 sample = 0; sample < p.samples; ++sample) {
        const float* partial = g.partial_tables[t] + (sample * p.heads + head) * rows;
        for (i64 r = 0; r < rows; ++r) gradient[r] += partial[rows - 1 - r];
      }
    }
    if (g.dhead_scale == nullptr) return;
    g.dhead_scale[head] = 0.0f;
    for (i64 sample = 0; sample < p.samples; ++sample)
      g.dhead_scale[head] += g.partial_head_scale[sample * p.heads + head];
  });
}

template <class T>
OFAKERN_LOCAL void backward(const AttentionInputs& in, const TensorView& out, const TensorView& lse,
                            const TensorView& dout, const TensorView& dlse, const AttentionGradients& gradients,
                            void* workspace, int threads) {
  Problem<T> p = make_problem<T>(in);
  Arena arena(workspace);
  const BackwardMemory<T> memory = BackwardMemory<T>::take(p, threads, arena);
  BackwardTensors<T> g = {};
  g.out = out.as<const T>();
  g.lse = lse.as<const float>();
  take_strides(dout, &g.dout, g.dout_stride);
  g.dlse = dlse.defined() ? dlse.as<const float>() : nullptr;
  g.dq = gradients.dq.as<T>();
  g.dk = gradients.dk.as<T>();
  g.dv = gradients.dv.as<T>();
  g.dq_pos = gradients.dq_pos.defined() ? gradients.dq_pos.as<T>() : nullptr;
  g.dk_pos = gradients.dk_pos.defined() ? gradients.dk_pos.as<T>() : nullptr;
  for (int t = 0, slot = 0; slot < 2; ++slot)
    if (in.terms[slot].table.defined()) {
      g.dtables[t] = gradients.dtables[slot].as<float>();
      g.partial_tables[t] = memory.partial_tables[t];
      ++t;
    }
  g.dhead_scale = gradients.dhead_scale.defined() ? gradients.dhead_scale.as<float>() : nullptr;
  g.partial_head_scale = memory.partial_head_scale;

  const i64 clusters = make_clusters(p, memory.order, memory.clusters);
  reverse_tables(p, threads);
  parallel_for(clusters * p.key_heads, threads, [&](i64 index, int thread) {
    const i64 c = index / p.key_heads, key_head = index % p.key_heads;
    const Cluster& cluster = memory.clusters[c];
    Arena own(memory.threads + memory.bytes_per_thread * thread);
    BackwardScratch<T> scratch = BackwardScratch<T>::take(p, memory.span, own);
    const AmxTiles tiles;
    scratch.keys.pack(p, key_head, cluster.keys, true);
    for (i64 tile = 0; tile < scratch.keys.tile_count(); ++tile) scratch.touched[tile] = false;
    for (i64 at = cluster.begin; at < cluster.end; ++at) backward_sample(p, g, scratch, memory.order[at], key_head);
    close_keys(p, g, scratch, key_head);
    zero_keys(p, g, key_head, c == 0 ? 0 : memory.clusters[c - 1].keys.hi, cluster.keys.lo);
    if (c == clusters - 1) zero_keys(p, g, key_head, cluster.keys.hi, p.keys);
  });
  if (clusters == 0)
    for (i64 key_head = 0; key_head < p.key_heads; ++key_head) zero_keys(p, g, key_head, 0, p.keys);
  reduce_partials(p, g, threads);
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

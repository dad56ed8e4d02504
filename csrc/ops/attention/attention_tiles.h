// What the forward and the backward pass share: sizes, scratch memory, packing of queries and keys, scores of a row.
#pragma once

#include "core/arena.h"
#include "core/pack.h"
#include "core/parallel.h"
#include "core/philox.h"
#include "ops/attention/attention.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_inff();

// kQueries rows keep their running state while tiles of kKeys keys go by; kStep rows at a time have their scores
// computed and used, so that a tile's packed keys and the step's scores meet in the first-level cache.
template <class Elem>
struct Tile {
  static constexpr i64 kQueries = 192, kStep = 48, kKeys = 128;
};
#if defined(OFAKERN_AMX)
template <>
struct Tile<bf16> {
  static constexpr i64 kQueries = 256, kStep = 32, kKeys = 256;
};
#endif

// Packed rows come in multiples of this, of which every product's own multiple is a divisor.
constexpr i64 kRowMultiple = 32;

// How many rows ahead of the one being packed are asked for.
constexpr i64 kRowsAhead = 8;

struct Interval {
  std::int32_t lo, hi;
  bool empty() const { return lo >= hi; }
};

OFAKERN_HOT Interval intersect(Interval a, Interval b) { return {max_of(a.lo, b.lo), min_of(a.hi, b.hi)}; }

// A relative term: `reversed[h * rows + rows - 1 - r]` is table[h, r] * log2(e). Reversed, keys whose coordinates
// ascend by one read ascending addresses.
struct Term {
  const float* table = nullptr;
  const float* reversed = nullptr;
  i64 rows = 0;
  const std::int32_t* q_coord = nullptr;
  const std::int32_t* k_coord = nullptr;
  const Interval* same = nullptr;
};

// How the coordinates of kWidth neighbouring keys run. One run: coordinate of lane l = base[0] + l. Two runs: lanes of
// `first` follow base[0], the others base[1]. Anything else is gathered.
struct KeyGroup {
  enum Kind : std::int32_t { one_run, two_runs, scattered };
  i64 base[2];
  std::uint32_t first;
  Kind kind;
};

template <class T>
struct Problem {
  i64 samples, queries, keys, heads, key_heads, width, pos_width, value_width;
  i64 depth;    // packed width of (q, q_pos): a multiple of what both roles in gemm need
  i64 columns;  // packed width of v
  const T *q, *k, *v, *q_pos, *k_pos;
  i64 q_stride[2], k_stride[2], v_stride[2], q_pos_stride[2], k_pos_stride[2];  // of tokens, of heads
  const Interval* visible;
  const std::int32_t *q_offsets, *k_offsets;
  const std::uint8_t* key_seen;
  const Interval* k_range;
  const float* head_scale;
  Term terms[2];
  int term_count;
  float scale;
  float dropout_scale;  // 1 / (1 - p)
  std::uint32_t dropout_threshold;
  std::uint64_t dropout_key;
  bool dropout;

  i64 group() const { return heads / key_heads; }
  i64 max_span() const {  // longest hull of keys over the samples
    i64 span = 0;
    for (i64 s = 0; s < samples; ++s) span = max_of<i64>(span, k_range[s].hi - k_range[s].lo);
    return span;
  }
};

template <class T>
OFAKERN_HOT void take_strides(const TensorView& view, const T** data, i64 stride[2]) {
  *data = view.defined() ? view.as<const T>() : nullptr;
  stride[0] = view.defined() ? view.stride[0] : 0;
  stride[1] = view.defined() ? view.stride[1] : 0;
}

template <class T>
OFAKERN_LOCAL Problem<T> make_problem(const AttentionInputs& in) {
  using Elem = Packed<T>;
  constexpr i64 kMultiple = max_of<i64>(Gemm<Elem>::kDepth, Gemm<Elem>::kColumns);
  Problem<T> p = {};
  const AttentionLayoutView& layout = in.layout;
  p.samples = layout.q_offsets.shape[0] - 1;
  p.queries = in.q.shape[0];
  p.keys = in.k.shape[0];
  p.heads = in.q.shape[1];
  p.key_heads = in.k.shape[1];
  p.width = in.q.shape[2];
  p.pos_width = in.q_pos.defined() ? in.q_pos.shape[2] : 0;
  p.value_width = in.v.shape[2];
  p.depth = round_up(p.width + p.pos_width, kMultiple);
  p.columns = round_up(p.value_width, kMultiple);
  take_strides(in.q, &p.q, p.q_stride);
  take_strides(in.k, &p.k, p.k_stride);
  take_strides(in.v, &p.v, p.v_stride);
  take_strides(in.q_pos, &p.q_pos, p.q_pos_stride);
  take_strides(in.k_pos, &p.k_pos, p.k_pos_stride);
  p.visible = layout.visible.as<const Interval>();
  p.q_offsets = layout.q_offsets.as<const std::int32_t>();
  p.k_offsets = layout.k_offsets.as<const std::int32_t>();
  p.key_seen = layout.key_seen.as<const std::uint8_t>();
  p.k_range = layout.k_range.as<const Interval>();
  p.head_scale = in.head_scale.defined() ? in.head_scale.as<const float>() : nullptr;
  for (const RelativeTermView& term : in.terms) {
    if (!term.table.defined()) continue;
    Term& t = p.terms[p.term_count++];
    t.table = term.table.as<const float>();
    t.rows = term.table.shape[1];
    t.q_coord = term.q_coord.as<const std::int32_t>();
    t.k_coord = term.k_coord.as<const std::int32_t>();
    t.same = term.same.as<const Interval>();
  }
  p.scale = static_cast<float>(in.scale);
  p.dropout = in.dropout_p > 0;
  if (p.dropout) {
    const std::int64_t* seed = in.dropout_seed.as<const std::int64_t>();
    p.dropout_key = static_cast<std::uint64_t>(seed[0]) + static_cast<std::uint64_t>(seed[1]) * 0x9E3779B97F4A7C15ull;
    p.dropout_threshold = static_cast<std::uint32_t>(min_of(in.dropout_p * 4294967296.0 + 0.5, 4294967295.0));
    p.dropout_scale = static_cast<float>(1.0 / (1.0 - in.dropout_p));
  }
  return p;
}

// The terms' tables, reversed and in units of log2(e), for all heads.
template <class T>
OFAKERN_LOCAL void take_reversed_tables(Problem<T>& p, Arena& arena) {
  for (int t = 0; t < p.term_count; ++t) p.terms[t].reversed = arena.take<float>(p.heads * p.terms[t].rows);
}

template <class T>
OFAKERN_LOCAL void reverse_tables(const Problem<T>& p, int threads) {
  parallel_for(p.heads * p.term_count, threads, [&](i64 task, int) {
    const Term& term = p.terms[task / p.heads];
    const i64 first = task % p.heads * term.rows;
    const float* table = term.table + first;
    float* reversed = const_cast<float*>(term.reversed) + first;
    for (i64 r = 0; r < term.rows; ++r) reversed[r] = table[term.rows - 1 - r] * kLog2e;
  });
}

OFAKERN_LOCAL KeyGroup describe_keys(const std::int32_t* coord, i64 count) {
  KeyGroup group = {{coord[0], coord[0]}, ~0u, KeyGroup::one_run};
  i64 l = 1;
  while (l < count && coord[l] == group.base[0] + l) ++l;
  if (l == count) return group;
  group.first = (1u << l) - 1u;
  group.base[1] = coord[l] - l;
  group.kind = KeyGroup::two_runs;
  for (; l < count; ++l)
    if (coord[l] != group.base[1] + l) group.kind = KeyGroup::scattered;
  return group;
}

// Keys [first, first + count) of one key head, packed tile by tile.
template <class T>
struct KeySide {
  using Elem = Packed<T>;
  static constexpr i64 kKeys = Tile<Elem>::kKeys;
  static constexpr int kPair = Gemm<Elem>::kPair;
  static constexpr i64 kStage =
      64;  // keys whose rows are gathered before they are packed: they stay in the first level
  static_assert(kStage % kPanel == 0 && kStage % Gemm<Elem>::kDepth == 0, "a stage holds whole panels");

  using Source = Rows<T>;

  Elem* k_transposed;   // scores:  B = K^T  [depth, keys]
  Elem* v_rows;         // output:  B = V    [keys, columns]          (forward)
  Elem* v_transposed;   // dP:      B = V^T  [columns, keys]          (backward)
  Elem* k_rows;         // dQ:      B = K    [keys, depth]            (backward)
  Elem* staging;        // kStage rows
  KeyGroup* groups[2];  // per term
  i64 first, count;

  static i64 tiles(i64 keys) { return ceil_div(keys, kKeys); }
  static i64 panel_columns(i64 width) { return round_up(width, kPanel); }

  static KeySide take(const Problem<T>& p, i64 span, bool backward, Arena& arena) {
    const i64 keys = tiles(span) * kKeys;
    KeySide side = {};
    side.k_transposed = arena.take<Elem>(keys * p.depth);
    if (backward) {
      side.v_transposed = arena.take<Elem>(keys * p.columns);
      side.k_rows = arena.take<Elem>(keys * panel_columns(p.depth));
    } else {
      side.v_rows = arena.take<Elem>(keys * panel_columns(p.columns));
    }
    side.staging = arena.take<Elem>(kStage * max_of(p.depth, p.columns));
    for (int t = 0; t < p.term_count; ++t) side.groups[t] = arena.take<KeyGroup>(keys / kWidth);
    return side;
  }

  i64 tile_count() const { return tiles(count); }
  i64 tile_keys(i64 tile) const { return min_of(kKeys, count - tile * kKeys); }
  i64 padded_tile_keys(i64 tile) const { return round_up(tile_keys(tile), kPanel); }
  const KeyGroup* tile_groups(int term, i64 tile) const { return groups[term] + tile * (kKeys / kWidth); }

  // B operands of one tile.
  static Panels<Elem> transposed(const Elem* data, i64 tile, i64 width) {
    return {data + tile * kKeys * width, width * kPanel, kPanel * kPair};
  }
  static Panels<Elem> rows(const Elem* data, i64 tile, i64 width) {
    return {data + tile * kKeys * panel_columns(width), kKeys * kPanel, kPanel * kPair};
  }

  void pack(const Problem<T>& p, i64 key_head, Interval range, bool backward) {
    first = range.lo;
    count = range.hi - range.lo;
    const Source k = {p.k + key_head * p.k_stride[1], p.k_stride[0], p.width};
    const Source k_pos = {p.pos_width == 0 ? nullptr : p.k_pos + key_head * p.k_pos_stride[1], p.k_pos_stride[0],
                          p.pos_width};
    const Source v = {p.v + key_head * p.v_stride[1], p.v_stride[0], p.value_width};
    for (i64 tile = 0; tile < tile_count(); ++tile)
      for (i64 key = 0; key < padded_tile_keys(tile); key += kStage) {
        const i64 keys = min_of(kStage, padded_tile_keys(tile) - key);
        stage(p, tile, key, keys, k, k_pos, p.depth);
        pack_transposed(k_transposed, tile, key, keys, p.depth);
        if (backward) pack_rows(k_rows, tile, key, keys, p.depth);
        stage(p, tile, key, keys, v, Source{}, p.columns);
        if (backward)
          pack_transposed(v_transposed, tile, key, keys, p.columns);
        else
          pack_rows(v_rows, tile, key, keys, p.columns);
      }
    for (int t = 0; t < p.term_count; ++t)
      for (i64 j = 0; j < count; j += kWidth)
        groups[t][j / kWidth] = describe_keys(p.terms[t].k_coord + first + j, min_of<i64>(kWidth, count - j));
  }

 private:
  // Keys [key, key + keys) of a tile, two tensors side by side; keys that no query sees, and pads, become zero.
  void stage(const Problem<T>& p, i64 tile, i64 key, i64 keys, Source a, Source b, i64 padded) {
    const i64 last = first + count;
    for (i64 r = 0; r < keys; ++r) {
      Elem* row = staging + r * padded;
      const i64 j = first + tile * kKeys + key + r;
      if (j + kRowsAhead < last) {
        prefetch_row(a.data + (j + kRowsAhead) * a.stride, a.width);
        if (b.data != nullptr) prefetch_row(b.data + (j + kRowsAhead) * b.stride, b.width);
      }
      if (j >= last || p.key_seen[j] == 0) {
        zero_row(row, padded);
        continue;
      }
      copy_row(a.data + j * a.stride, a.width, row, b.data == nullptr ? padded : a.width);
      if (b.data != nullptr) copy_row(b.data + j * b.stride, b.width, row + a.width, padded - a.width);
    }
  }
  void pack_transposed(Elem* data, i64 tile, i64 key, i64 keys, i64 width) {
    for (i64 x = 0; x < keys; x += kPanel)
      transpose_units(as_units(staging + x * width), width / kPair, kPanel, width / kPair,
                      as_units(data + (tile * kKeys + key + x) * width), kPanel);
  }
  void pack_rows(Elem* data, i64 tile, i64 key, i64 keys, i64 width) {
    for (i64 c = 0; c < width; c += kPanel)
      interleave(staging + c, width, keys, min_of<i64>(kPanel, width - c),
                 as_units(data + tile * kKeys * panel_columns(width) + c * kKeys + key * kPanel), kPanel);
  }
};

// Rows [first, first + count) of queries of one head as an A operand [kQueries, depth].
// Rows without keys, and pads, are zero: their scores are never used, but 0 * NaN must not reach a gradient.
template <class T>
OFAKERN_LOCAL void pack_queries(const Problem<T>& p, i64 head, i64 first, i64 count, Packed<T>* rows) {
  const T* q = p.q + head * p.q_stride[1];
  const T* q_pos = p.pos_width == 0 ? nullptr : p.q_pos + head * p.q_pos_stride[1];
  for (i64 r = 0; r < round_up(count, kRowMultiple); ++r) {
    Packed<T>* row = rows + r * p.depth;
    const i64 i = first + r;
    if (r + kRowsAhead < count) {
      prefetch_row(q + (i + kRowsAhead) * p.q_stride[0], p.width);
      if (q_pos != nullptr) prefetch_row(q_pos + (i + kRowsAhead) * p.q_pos_stride[0], p.pos_width);
    }
    if (r >= count || p.visible[i].empty()) {
      zero_row(row, p.depth);
      continue;
    }
    copy_row(q + i * p.q_stride[0], p.width, row, q_pos == nullptr ? p.depth : p.width);
    if (q_pos != nullptr) copy_row(q_pos + i * p.q_pos_stride[0], p.pos_width, row + p.width, p.depth - p.width);
  }
}

// Hull of the keys that rows [first, first + count) see.
template <class T>
OFAKERN_LOCAL Interval hull_of(const Problem<T>& p, i64 first, i64 count) {
  Interval hull = {0, 0};
  for (i64 i = first; i < first + count; ++i) {
    const Interval seen = p.visible[i];
    if (seen.empty()) continue;
    hull = hull.empty() ? seen : Interval{min_of(hull.lo, seen.lo), max_of(hull.hi, seen.hi)};
  }
  return hull;
}

// How the rows that share their intervals go through one tile of keys: which lanes of which vectors they see, and where
// the lanes' table entries stand. Made once, used by all such rows.
template <class T>
struct TilePlan {
  static constexpr int kVectors = static_cast<int>(Tile<Packed<T>>::kKeys / kWidth);
  struct Entries {
    Interval same = {-1, -1};  // as the layout has it
    int begin, end;            // vectors with an entry
    bool scattered;            // some vector must be gathered
    bool whole[kVectors];      // all lanes read table[base + lane]
    const std::int32_t* coords;
    // Lanes `first` read table[base + lane], lanes `second` read table[base_second + lane].
    i64 base[kVectors], base_second[kVectors];
    Mask first[kVectors], second[kVectors];
  };

  Interval visible = {-1, -1};  // as the layout has it
  i64 tile = -1;
  int lo = 0, hi = 0;      // keys seen, counted from the tile's first
  int begin = 0, end = 0;  // vectors that hold them
  bool whole = false;      // those vectors hold nothing else
  Entries terms[2];

  bool empty() const { return lo >= hi; }
  Mask lanes(int v) const { return mask_range(lo - v * kWidth, hi - v * kWidth); }

  void set(const Problem<T>& p, const KeySide<T>& side, i64 new_tile, i64 i) {
    const bool same_keys = new_tile == tile && p.visible[i].lo == visible.lo && p.visible[i].hi == visible.hi;
    if (!same_keys) set_keys(side, new_tile, p.visible[i]);
    for (int t = 0; t < p.term_count; ++t) {
      const Interval same = p.terms[t].same[i];
      if (!same_keys || same.lo != terms[t].same.lo || same.hi != terms[t].same.hi)
        set_term(p.terms[t], side, terms[t], same, side.tile_groups(t, new_tile));
    }
  }

 private:
  void set_keys(const KeySide<T>& side, i64 new_tile, Interval new_visible) {
    visible = new_visible;
    tile = new_tile;
    const Interval seen = local(side, visible);
    lo = seen.lo;
    hi = seen.hi;
    begin = lo / kWidth;
    end = static_cast<int>(ceil_div(hi, kWidth));
    whole = lo % kWidth == 0 && hi % kWidth == 0;
  }

  // Counted from the tile's first key, clipped to the tile; {0, 0} when nothing is left.
  Interval local(const KeySide<T>& side, Interval interval) const {
    const i64 first = side.first + tile * KeySide<T>::kKeys;
    const i64 from = max_of<i64>(interval.lo - first, 0), to = min_of<i64>(interval.hi - first, side.tile_keys(tile));
    return from < to ? Interval{static_cast<std::int32_t>(from), static_cast<std::int32_t>(to)} : Interval{0, 0};
  }

  void set_term(const Term& term, const KeySide<T>& side, Entries& entries, Interval same, const KeyGroup* groups) {
    entries.same = same;
    entries.coords = term.k_coord + side.first + tile * KeySide<T>::kKeys;
    entries.scattered = false;
    const Interval keys = intersect(local(side, same), Interval{lo, hi});
    entries.begin = keys.empty() ? 0 : keys.lo / kWidth;
    entries.end = keys.empty() ? 0 : static_cast<int>(ceil_div(keys.hi, kWidth));
    for (int v = entries.begin; v < entries.end; ++v) {
      const KeyGroup& group = groups[v];
      const Mask lanes = mask_range(keys.lo - v * kWidth, keys.hi - v * kWidth);
      entries.scattered = entries.scattered || group.kind == KeyGroup::scattered;
      entries.whole[v] = group.kind == KeyGroup::one_run && keys.lo <= v * kWidth && keys.hi >= (v + 1) * kWidth;
      entries.base[v] = group.base[0];
      entries.base_second[v] = group.base[1];
      entries.first[v] = group.kind == KeyGroup::scattered ? lanes : mask_and(lanes, mask_bits(group.first));
      entries.second[v] = mask_andnot(lanes, mask_bits(group.first));
    }
  }
};

// The row's own part of a term: table entries of key lane l stand at table[base + l] (see TilePlan).
struct RowTables {
  const float* table[2];
};

template <class T>
OFAKERN_HOT RowTables row_tables(const Problem<T>& p, i64 head, i64 i) {
  RowTables row = {};
  for (int t = 0; t < p.term_count; ++t)
    row.table[t] = p.terms[t].reversed + head * p.terms[t].rows + (p.terms[t].rows - 1 - p.terms[t].q_coord[i]);
  return row;
}

// The entries of one term for vector v of a row.
template <class Entries>
OFAKERN_HOT Vec table_lanes(const Entries& entries, const float* table, int v) {
  if (entries.whole[v]) return vload(table + entries.base[v]);
  if (entries.scattered)
    return vgather(table, entries.coords + v * kWidth, mask_or(entries.first[v], entries.second[v]));
  return vload_merge(vload_masked(table + entries.base[v], entries.first[v]), table + entries.base_second[v],
                     entries.second[v]);
}

// Scores minus `shift`, in units of log2(e), for vector v: the scaled dot product plus the relative terms.
template <int TERMS, class Plan>
OFAKERN_HOT Vec score_lanes(const Plan& plan, const RowTables& row, const float* products, Vec scale, Vec shift,
                            int v) {
  Vec score = vfma(vload(products + v * kWidth), scale, vsub(vzero(), shift));
  for (int t = 0; t < TERMS; ++t)
    if (v >= plan.terms[t].begin && v < plan.terms[t].end)
      score = vadd(score, table_lanes(plan.terms[t], row.table[t], v));
  return score;
}

// Dropout factors (0 or 1 / (1 - p)) of keys [first_key, first_key + count) for query i; README.md in
// ofakern/ops/attention says which bits these are.
template <class T>
OFAKERN_LOCAL void dropout_factors(const Problem<T>& p, i64 sample, i64 head, i64 i, i64 first_key, i64 count,
                                   float* out) {
  const std::uint32_t row = static_cast<std::uint32_t>(i - p.q_offsets[sample]);
  const std::uint32_t start = static_cast<std::uint32_t>(first_key - p.k_offsets[sample]);
  std::uint32_t words[4 * kPhiloxCounters];
  float factors[4 * kPhiloxCounters];
  for (i64 x = 0; x < count;) {
    const std::uint32_t j = start + static_cast<std::uint32_t>(x);  // modulo 2^32, and so a quarter of it modulo 2^30
    philox(words, j >> 2, 0x3FFFFFFFu, row, static_cast<std::uint32_t>(head), static_cast<std::uint32_t>(sample),
           p.dropout_key);
    for (int n = 0; n < 4 * kPhiloxCounters; ++n) factors[n] = words[n] >= p.dropout_threshold ? p.dropout_scale : 0.0f;
    const i64 skipped = j & 3u, taken = min_of(count - x, i64{4 * kPhiloxCounters} - skipped);
    for (i64 y = 0; y < taken; ++y) out[x + y] = factors[skipped + y];
    x += taken;
  }
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

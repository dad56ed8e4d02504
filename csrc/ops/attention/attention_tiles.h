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
  bool operator==(Interval other) const { return lo == other.lo && hi == other.hi; }
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

// Samples members[from, to) take rows of q_pos from q_first on, of k_pos from k_first on.
struct PositionSet {
  std::int32_t from, to, q_first, k_first;
};

// At most this many samples of a set go through a task together.
constexpr i64 kTogether = 8;

template <class T>
struct Problem {
  i64 samples, queries, keys, heads, key_heads, width, pos_width, value_width;
  i64 joined;     // width of q_pos where it stands beside q in one product
  i64 depth;      // packed width of (q, joined q_pos): a multiple of what both roles in gemm need
  i64 columns;    // packed width of v
  i64 pos_depth;  // packed width of a q_pos that is multiplied once for several samples, else 0
  const T *q, *k, *v, *q_pos, *k_pos;
  i64 q_stride[2], k_stride[2], v_stride[2], q_pos_stride[2], k_pos_stride[2];  // of tokens, of heads
  const Interval* visible;
  const std::int32_t *q_offsets, *k_offsets;
  const std::uint8_t* key_seen;
  const Interval* k_range;
  const PositionSet* sets;  // or null: no samples share positions
  const std::int32_t* members;
  i64 set_count, together;
  const float* head_scale;
  Term terms[2];
  int term_count;
  float scale;
  float dropout_scale;  // 1 / (1 - p)
  std::uint32_t dropout_threshold;
  std::uint64_t dropout_key;
  bool dropout;

  i64 group() const { return heads / key_heads; }
  bool shared() const { return sets != nullptr; }
  i64 queries_of(i64 sample) const { return q_offsets[sample + 1] - q_offsets[sample]; }
  // Keys that are packed for a sample: those it sees; with shared positions all before them, so that tiles line up.
  Interval keys_of(i64 sample) const {
    const Interval range = k_range[sample];
    return shared() && !range.empty() ? Interval{k_offsets[sample], range.hi} : range;
  }
  i64 span_of(i64 sample) const { return keys_of(sample).hi - keys_of(sample).lo; }
  i64 max_span() const {  // longest run of keys over the samples
    i64 span = 0;
    for (i64 s = 0; s < samples; ++s) span = max_of(span, span_of(s));
    return span;
  }
};

template <class T>
OFAKERN_HOT void take_strides(const TensorView& view, const T** data, i64 stride[2]) {
  *data = view.defined() ? view.as<const T>() : nullptr;
  stride[0] = view.defined() ? view.stride[0] : 0;
  stride[1] = view.defined() ? view.stride[1] : 0;
}

// Many samples of a set share its position products; fewer make more tasks (12 are enough for a few threads) and need
// less memory (that of 8192 packed keys). A matter of shapes alone.
template <class T>
OFAKERN_LOCAL i64 samples_together(const Problem<T>& p) {
  constexpr i64 kTasks = 12, kKeys = 8192;
  i64 largest = 1;
  for (i64 u = 0; u < p.set_count; ++u) largest = max_of<i64>(largest, p.sets[u].to - p.sets[u].from);
  const i64 wanted = min_of(min_of(kTogether, p.samples * p.key_heads / kTasks), kKeys / max_of<i64>(p.max_span(), 1));
  return max_of<i64>(1, min_of(wanted, largest));
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
  const SharedPositionsView& shared = layout.shared;
  const bool apart = shared.sets.defined() && p.pos_width > 0;
  p.joined = apart ? 0 : p.pos_width;
  p.pos_depth = apart ? round_up(p.pos_width, kMultiple) : 0;
  p.depth = round_up(p.width + p.joined, kMultiple);
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
  p.together = 1;
  if (apart) {
    p.sets = shared.sets.as<const PositionSet>();
    p.set_count = shared.sets.shape[0];
    p.members = shared.members.as<const std::int32_t>();
    p.together = samples_together(p);
  }
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

// Opening a parallel region takes as long as this many entries.
constexpr i64 kSerialEntries = 1 << 14;

template <class T>
OFAKERN_LOCAL void reverse_tables(const Problem<T>& p, int threads) {
  i64 entries = 0;
  for (int t = 0; t < p.term_count; ++t) entries += p.heads * p.terms[t].rows;
  parallel_for(p.heads * p.term_count, entries < kSerialEntries ? 1 : threads, [&](i64 task, int) {
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

// Rows [at, at + rows) of one tensor, or of two side by side, `padded` wide. Rows that are not `wanted`, and pads from
// `last` on, become zero.
template <class T, class Wanted>
OFAKERN_HOT void stage_rows(Rows<T> a, Rows<T> b, i64 at, i64 rows, i64 last, i64 padded, Packed<T>* dst,
                            const Wanted& wanted) {
  for (i64 r = 0; r < rows; ++r) {
    Packed<T>* row = dst + r * padded;
    const i64 j = at + r;
    if (j + kRowsAhead < last) {
      prefetch_row(a.data + (j + kRowsAhead) * a.stride, a.width);
      if (b.data != nullptr) prefetch_row(b.data + (j + kRowsAhead) * b.stride, b.width);
    }
    if (j >= last || !wanted(j)) {
      zero_row(row, padded);
      continue;
    }
    copy_row(a.data + j * a.stride, a.width, row, b.data == nullptr ? padded : a.width);
    if (b.data != nullptr) copy_row(b.data + j * b.stride, b.width, row + a.width, padded - a.width);
  }
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

  // B operands of one tile from key `key` on, the first of a panel.
  static Panels<Elem> transposed(const Elem* data, i64 tile, i64 width, i64 key = 0) {
    return {data + (tile * kKeys + key) * width, width * kPanel, kPanel * kPair};
  }
  static Panels<Elem> rows(const Elem* data, i64 tile, i64 width, i64 key = 0) {
    return {data + tile * kKeys * panel_columns(width) + key * kPanel, kKeys * kPanel, kPanel * kPair};
  }

  // Counted from the tile's first key, clipped to the tile; {0, 0} when nothing is left.
  Interval local(i64 tile, Interval interval) const {
    const i64 start = first + tile * kKeys;
    const i64 from = max_of<i64>(interval.lo - start, 0), to = min_of<i64>(interval.hi - start, tile_keys(tile));
    return from < to ? Interval{static_cast<std::int32_t>(from), static_cast<std::int32_t>(to)} : Interval{0, 0};
  }

  void pack(const Problem<T>& p, i64 key_head, Interval range, bool backward) {
    first = range.lo;
    count = range.hi - range.lo;
    const Source k = {p.k + key_head * p.k_stride[1], p.k_stride[0], p.width};
    const Source k_pos = {p.joined == 0 ? nullptr : p.k_pos + key_head * p.k_pos_stride[1], p.k_pos_stride[0],
                          p.joined};
    const Source v = {p.v + key_head * p.v_stride[1], p.v_stride[0], p.value_width};
    const auto seen = [&](i64 j) { return p.key_seen[j] != 0; };
    for (i64 tile = 0; tile < tile_count(); ++tile)
      for (i64 key = 0; key < padded_tile_keys(tile); key += kStage) {
        const i64 keys = min_of(kStage, padded_tile_keys(tile) - key), at = first + tile * kKeys + key;
        stage_rows(k, k_pos, at, keys, first + count, p.depth, staging, seen);
        pack_transposed(staging, k_transposed, tile, key, keys, p.depth);
        if (backward) pack_rows(staging, k_rows, tile, key, keys, p.depth);
        stage_rows(v, Source{}, at, keys, first + count, p.columns, staging, seen);
        if (backward)
          pack_transposed(staging, v_transposed, tile, key, keys, p.columns);
        else
          pack_rows(staging, v_rows, tile, key, keys, p.columns);
      }
    for (int t = 0; t < p.term_count; ++t)
      for (i64 j = 0; j < count; j += kWidth)
        groups[t][j / kWidth] = describe_keys(p.terms[t].k_coord + first + j, min_of<i64>(kWidth, count - j));
  }

  static void pack_transposed(const Elem* staging, Elem* data, i64 tile, i64 key, i64 keys, i64 width) {
    for (i64 x = 0; x < keys; x += kPanel)
      transpose_units(as_units(staging + x * width), width / kPair, kPanel, width / kPair,
                      as_units(data + (tile * kKeys + key + x) * width), kPanel);
  }
  static void pack_rows(const Elem* staging, Elem* data, i64 tile, i64 key, i64 keys, i64 width) {
    for (i64 c = 0; c < width; c += kPanel)
      interleave(staging + c, width, keys, min_of<i64>(kPanel, width - c),
                 as_units(data + tile * kKeys * panel_columns(width) + c * kKeys + key * kPanel), kPanel);
  }
};

// Rows [first, first + count) of queries of one head as an A operand [kQueries, depth].
// Rows without keys, and pads, are zero: their scores are never used, but 0 * NaN must not reach a gradient.
template <class T>
OFAKERN_LOCAL void pack_queries(const Problem<T>& p, i64 head, i64 first, i64 count, Packed<T>* rows) {
  const Rows<T> q = {p.q + head * p.q_stride[1], p.q_stride[0], p.width};
  const Rows<T> q_pos = {p.joined == 0 ? nullptr : p.q_pos + head * p.q_pos_stride[1], p.q_pos_stride[0], p.joined};
  stage_rows(q, q_pos, first, round_up(count, kRowMultiple), first + count, p.depth, rows,
             [&](i64 i) { return !p.visible[i].empty(); });
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

// What a step takes of a tile, keys counted from the tile's first: those in `seen`, from a panel's first key to a
// multiple of what the products take.
template <class T>
OFAKERN_LOCAL Interval step_keys(const KeySide<T>& side, i64 tile, Interval seen) {
  constexpr i64 kMultiple = max_of<i64>(Gemm<Packed<T>>::kDepth, kWidth);
  const Interval keys = side.local(tile, seen);
  return {static_cast<std::int32_t>(keys.lo / kPanel * kPanel),
          static_cast<std::int32_t>(round_up(keys.hi, kMultiple))};
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
    const bool same_keys = new_tile == tile && p.visible[i] == visible;
    if (!same_keys) set_keys(side, new_tile, p.visible[i]);
    for (int t = 0; t < p.term_count; ++t) {
      const Interval same = p.terms[t].same[i];
      if (!same_keys || !(same == terms[t].same))
        set_term(p.terms[t], side, terms[t], same, side.tile_groups(t, new_tile));
    }
  }

 private:
  void set_keys(const KeySide<T>& side, i64 new_tile, Interval new_visible) {
    visible = new_visible;
    tile = new_tile;
    const Interval seen = side.local(tile, visible);
    lo = seen.lo;
    hi = seen.hi;
    begin = lo / kWidth;
    end = static_cast<int>(ceil_div(hi, kWidth));
    whole = lo % kWidth == 0 && hi % kWidth == 0;
  }

  void set_term(const Term& term, const KeySide<T>& side, Entries& entries, Interval same, const KeyGroup* groups) {
    entries.same = same;
    entries.coords = term.k_coord + side.first + tile * KeySide<T>::kKeys;
    entries.scattered = false;
    const Interval keys = intersect(side.local(tile, same), Interval{lo, hi});
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

// Samples that share their positions go through a task together: a tile of q_pos.k_pos is multiplied once, every
// sample's q.k is added onto it, and the gradients of q_pos and k_pos come from the sum of the samples' score
// gradients.
#pragma once

#include "ops/attention/attention_tiles.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// One of the samples that go through a task together, and the block of its query rows at hand.
struct Member {
  i64 sample;
  i64 first, rows;              // query rows of the task
  i64 block_first, block_rows;  // of the block
  i64 tile_begin, tile_end;     // tiles of keys that the block sees

  // The task's rows from row `first_row` of the sample on.
  template <class T>
  void set(const Problem<T>& p, i64 of_sample, i64 first_row, i64 count) {
    sample = of_sample;
    first = p.q_offsets[sample] + first_row;
    rows = max_of<i64>(0, min_of<i64>(count, p.queries_of(sample) - first_row));
  }
  // The block of rows [r, r + count) of the task; first_key: where the sample's tiles begin.
  template <class T>
  void set_block(const Problem<T>& p, i64 r, i64 count, i64 first_key) {
    constexpr i64 kKeys = Tile<Packed<T>>::kKeys;
    block_first = first + r;
    block_rows = max_of<i64>(0, min_of(count, rows - r));
    const Interval hull = hull_of(p, block_first, block_rows);
    tile_begin = hull.empty() ? 0 : (hull.lo - first_key) / kKeys;
    tile_end = hull.empty() ? 0 : ceil_div(hull.hi - first_key, kKeys);
  }
  bool sees(i64 tile) const { return tile_begin <= tile && tile < tile_end; }
};

// The tiles of keys that some member's block sees; one without keys sees none.
struct TileRange {
  i64 begin, end;
};
template <class M>
OFAKERN_HOT TileRange tiles_of(const M* members, i64 count) {
  TileRange range = {0, 0};
  for (i64 m = 0; m < count; ++m) {
    if (members[m].tile_begin == members[m].tile_end) continue;
    const bool first = range.begin == range.end;
    range.begin = first ? members[m].tile_begin : min_of(range.begin, members[m].tile_begin);
    range.end = first ? members[m].tile_end : max_of(range.end, members[m].tile_end);
  }
  return range;
}

// Members [from, to) of a set: those that go together. Without shared positions a sample alone.
struct Chunk {
  i64 set, from, to;
  i64 q_rows, k_rows;  // of the longest
};

template <class T>
OFAKERN_HOT i64 sample_at(const Problem<T>& p, i64 place) {
  return p.shared() ? p.members[place] : place;
}

// Calls body(chunk) for all chunks, in an order that depends on the layout only.
template <class T, class Body>
OFAKERN_HOT void for_chunks(const Problem<T>& p, const Body& body) {
  for (i64 u = 0; u < (p.shared() ? p.set_count : p.samples); ++u) {
    const i64 begin = p.shared() ? p.sets[u].from : u, end = p.shared() ? p.sets[u].to : u + 1;
    if (begin == end) continue;
    const i64 pieces = ceil_div(end - begin, p.together), size = ceil_div(end - begin, pieces);
    for (i64 from = begin; from < end; from += size) {
      Chunk chunk = {u, from, min_of(from + size, end), 0, 0};
      for (i64 at = from; at < chunk.to; ++at) {
        chunk.q_rows = max_of(chunk.q_rows, p.queries_of(sample_at(p, at)));
        chunk.k_rows = max_of(chunk.k_rows, p.span_of(sample_at(p, at)));
      }
      body(chunk);
    }
  }
}

// The positions' half of the scores: their keys, packed as KeySide packs a sample's, and the products of a block.
template <class T>
struct PositionSide {
  using Elem = Packed<T>;
  using Side = KeySide<T>;
  static constexpr i64 kQueries = Tile<Elem>::kQueries, kKeys = Tile<Elem>::kKeys;

  Elem* k_transposed;  // products: B = K_pos^T [pos_depth, keys]
  Elem* k_rows;        // dq_pos:   B = K_pos   [keys, pos_depth]     (backward)
  Elem* staging;
  Elem* queries;   // [kQueries, pos_depth]
  float* scores;   // [kQueries, kKeys]
  float* dscores;  // the samples' dS, added up (backward)
  i64 q_first, k_first, count;

  static PositionSide take(const Problem<T>& p, i64 span, bool backward, Arena& arena) {
    PositionSide side = {};
    if (!p.shared()) return side;
    const i64 keys = Side::tiles(span) * kKeys;
    side.k_transposed = arena.take<Elem>(keys * p.pos_depth);
    if (backward) side.k_rows = arena.take<Elem>(keys * Side::panel_columns(p.pos_depth));
    side.staging = arena.take<Elem>(Side::kStage * p.pos_depth);
    side.queries = arena.take<Elem>(kQueries * p.pos_depth);
    side.scores = arena.take<float>(kQueries * kKeys);
    if (backward) side.dscores = arena.take<float>(kQueries * kKeys);
    return side;
  }

  i64 tile_count() const { return Side::tiles(count); }
  i64 tile_keys(i64 tile) const { return min_of(kKeys, count - tile * kKeys); }

  // Rows that none of the chunk's samples sees may hold anything: they become zero.
  void pack(const Problem<T>& p, const Chunk& chunk, i64 key_head, bool backward) {
    q_first = p.sets[chunk.set].q_first;
    k_first = p.sets[chunk.set].k_first;
    count = chunk.k_rows;
    const Rows<T> source = {p.k_pos + key_head * p.k_pos_stride[1] + k_first * p.k_pos_stride[0], p.k_pos_stride[0],
                            p.pos_width};
    const auto seen = [&](i64 j) {
      for (i64 at = chunk.from; at < chunk.to; ++at)
        if (j < p.span_of(p.members[at]) && p.key_seen[p.k_offsets[p.members[at]] + j] != 0) return true;
      return false;
    };
    for (i64 tile = 0; tile < tile_count(); ++tile) {
      const i64 padded = round_up(tile_keys(tile), kPanel);
      for (i64 key = 0; key < padded; key += Side::kStage) {
        const i64 keys = min_of(Side::kStage, padded - key);
        stage_rows(source, Rows<T>{}, tile * kKeys + key, keys, count, p.pos_depth, staging, seen);
        Side::pack_transposed(staging, k_transposed, tile, key, keys, p.pos_depth);
        if (backward) Side::pack_rows(staging, k_rows, tile, key, keys, p.pos_depth);
      }
    }
  }

  // Rows [first, first + rows) of q_pos, counted from the set's first.
  void pack_queries(const Problem<T>& p, const Chunk& chunk, i64 head, i64 first, i64 rows) {
    const Rows<T> source = {p.q_pos + head * p.q_pos_stride[1] + q_first * p.q_pos_stride[0], p.q_pos_stride[0],
                            p.pos_width};
    stage_rows(source, Rows<T>{}, first, round_up(rows, kRowMultiple), first + rows, p.pos_depth, queries, [&](i64 i) {
      for (i64 at = chunk.from; at < chunk.to; ++at)
        if (i < p.queries_of(p.members[at]) && !p.visible[p.q_offsets[p.members[at]] + i].empty()) return true;
      return false;
    });
  }

  // The products of the block's rows with one tile of keys.
  void multiply(const Problem<T>& p, i64 rows, i64 tile) {
    gemm(round_up(rows, Gemm<Elem>::kRows), round_up(tile_keys(tile), Gemm<Elem>::kColumns), p.pos_depth, queries,
         p.pos_depth, Side::transposed(k_transposed, tile, p.pos_depth), scores, kKeys, false);
  }

  // What q.k of rows from `row` on is added to.
  Onto onto(i64 row) const { return scores == nullptr ? Onto{} : Onto{scores + row * kKeys, kKeys}; }
};

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

// The backward pass over one chunk: gradients of the scores block by block, never all of them at once.
#pragma once

#include "ops/cross_entropy/cross_entropy_losses.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// Where the gradients of a group's scores are made: f32's in the operand of dweight.
template <class T>
OFAKERN_HOT Tile gradient_tile(const Chunk<T>& c, const Workbench<T>& bench, i64 group) {
  if constexpr (sizeof(Operand<T>) == sizeof(float))
    if (bench.d_rows != nullptr) return {bench.d_rows + group * kGroup, row_stride<float>(c.capacity)};
  return {bench.scores, kGroup};
}

// Score gradients of one block and group, in place of the scores where these were computed again.
// SOURCE_STORED: probabilities are the stored exponentials times exp(block maximum - lse).
template <class T, bool SOURCE_STORED>
OFAKERN_LOCAL void score_gradients(const Problem<T>& p, const Chunk<T>& c, i64 block, i64 group, const Tile& tile) {
  const i64 rows = p.block_rows(block);
  const std::uint64_t* bits = c.bits == nullptr ? nullptr : c.bits + group * p.vocabulary + block * kBlock;
  for (i64 t = 0; t < c.padded_tokens(group); t += kWidth) {
    const i64 token = group * kGroup + t;
    const Vec lse = vload(c.lse + token), scale = vload(c.scale + token), each = vload(c.each + token);
    const Stored<T>* stored = nullptr;
    Vec factor = scale;
    if (SOURCE_STORED) {
      stored = c.stored + (block * (c.capacity / kGroup) + group) * kBlock * kGroup + t;
      const Vec top = vload(c.block_max + block * c.capacity + token);
      factor = vmul(scale, vexp2(vmul(vsub(top, lse), vset(kLog2e))));
    }
    for (i64 r = 0; r < rows; ++r) {
      float* at = tile.data + r * tile.stride + t;
      const Vec e = SOURCE_STORED ? vload_as(stored + r * kGroup) : vexp2(vmul(vsub(vload(at), lse), vset(kLog2e)));
      Vec d = vsub(vmul(e, factor), each);
      if (bits != nullptr) d = vselect(word_mask(bits[r], t), d, vzero());
      vstore(at, d);
    }
  }
  for (i64 t = 0; t < c.group_tokens(group); ++t) {
    const i64 token = group * kGroup + t, label = p.labels[c.row(token)];
    if (label / kBlock != block) continue;
    if (bits == nullptr || (bits[label % kBlock] >> t & 1u) != 0)
      tile.data[label % kBlock * tile.stride + t] -= c.label_scale[token];
  }
}

// Rows [rows, padded) of the tile become zero: products run over them.
OFAKERN_LOCAL void pad_tile(const Tile& tile, i64 rows, i64 padded) {
  for (i64 r = rows; r < padded; ++r) zero_row(tile.data + r * tile.stride, kGroup);
}

// The tile as rows of units.
OFAKERN_HOT Tile tile_units(const Tile& tile, i64, i64, float*) { return tile; }
#if defined(OFAKERN_AMX)
OFAKERN_LOCAL Tile tile_units(const Tile& tile, i64 rows, i64 tokens, bf16* units) {
  for (i64 r = 0; r < rows; r += 2) {
    const float *even = tile.data + r * tile.stride, *odd = even + tile.stride;
    for (i64 t = 0; t < tokens; t += kWidth) vstore_pairs(units + r * kGroup + 2 * t, vload(even + t), vload(odd + t));
  }
  return {reinterpret_cast<float*>(units), kGroup};
}
#endif

// dhidden of one group += (score gradients)^T weight.
template <class T>
OFAKERN_LOCAL void add_dhidden(const Problem<T>& p, const Chunk<T>& c, const Workbench<T>& bench, const Tile& tile,
                               i64 padded_rows, i64 group, i64 partial) {
  using Elem = Operand<T>;
  constexpr int kPair = Gemm<Elem>::kPair;
  const i64 tokens = c.padded_tokens(group), units = padded_rows / kPair;
  const Tile pairs = tile_units(tile, padded_rows, tokens, bench.d_pairs);
  transpose_units(as_units(pairs.data), pairs.stride, units, tokens, as_units(bench.d_tokens), kBlock / kPair);
  const Panels<Elem> weight = {bench.weight_panels, kBlock * kPanel, kPanel * kPair};
  product(tokens, p.depth, padded_rows, bench.d_tokens, kBlock, weight, c.dhidden[partial] + group * kGroup * p.depth,
          p.depth, c.started[partial] != 0);
}

// What is not in the operand of dweight yet.
template <class T>
OFAKERN_LOCAL void keep_rows(const Chunk<T>& c, const Workbench<T>& bench, const Tile& tile, i64 rows, i64 group) {
  using Elem = Operand<T>;
  if (sizeof(Elem) == sizeof(float)) return;
  for (i64 r = 0; r < rows; ++r)
    for (i64 t = 0; t < c.padded_tokens(group); t += kWidth)
      vstore_as(bench.d_rows + r * row_stride<Elem>(c.capacity) + group * kGroup + t,
                vload(tile.data + r * tile.stride + t));
}

// Where a block's gradient can be summed in place.
OFAKERN_HOT float* sum_in_place(const Problem<float>& p, float* dweight) {
  return p.width == p.depth ? dweight : nullptr;
}
template <class T>
OFAKERN_HOT float* sum_in_place(const Problem<T>&, T*) {
  return nullptr;
}

// dweight of one block: rounded to its dtype after every chunk.
template <class T>
OFAKERN_LOCAL void add_dweight(const Problem<T>& p, const Chunk<T>& c, const Workbench<T>& bench, i64 block, bool add,
                               T* dweight) {
  using Elem = Operand<T>;
  const i64 rows = p.block_rows(block);
  const Panels<Elem> hidden = {c.rows, c.capacity * kPanel, kPanel * Gemm<Elem>::kPair};
  float* const direct = sum_in_place(p, dweight + block * kBlock * p.width);
  product(round_up(rows, Gemm<Elem>::kRows), p.depth, round_up(c.count, kTokenMultiple), bench.d_rows,
          row_stride<Elem>(c.capacity), hidden, direct == nullptr ? bench.dweight : direct, p.depth,
          direct != nullptr && add);
  if (direct != nullptr) return;
  for (i64 r = 0; r < rows; ++r) {
    const float* sum = bench.dweight + r * p.depth;
    T* out = dweight + (block * kBlock + r) * p.width;
    for (i64 d = 0; d < p.width; d += kWidth) {
      const i64 n = p.width - d;
      const Vec value = vload(sum + d);
      vstore_n(out + d, add ? vadd(vload_n(out + d, n), value) : value, n);
    }
  }
}

// The tile's row sums; pads of the group are zero.
template <class T>
OFAKERN_LOCAL void add_dbias(const Chunk<T>& c, const Tile& tile, i64 rows, i64 group, float* dbias) {
  for (i64 r = 0; r < rows; ++r) {
    Vec sum = vzero();
    for (i64 t = 0; t < c.padded_tokens(group); t += kWidth) sum = vadd(sum, vload(tile.data + r * tile.stride + t));
    dbias[r] += hsum(sum);
  }
}

// A block that no token of the chunk may choose.
template <class T>
OFAKERN_LOCAL void skip_gradient(const Problem<T>& p, i64 block, bool add, T* dweight) {
  if (dweight == nullptr || add) return;
  std::memset(static_cast<void*>(dweight + block * kBlock * p.width), 0,
              static_cast<std::size_t>(p.block_rows(block) * p.width) * sizeof(T));
}

template <class T>
OFAKERN_LOCAL void gradient_of_block(const Problem<T>& p, Chunk<T>& c, const Workbench<T>& bench, i64 block,
                                     i64 partial, bool add, T* dweight) {
  if (c.skips(block)) return skip_gradient(p, block, add, dweight);
  using Elem = Operand<T>;
  const i64 rows = p.block_rows(block), padded = round_up(rows, kTokenMultiple);
  const RowsOf<Elem> weight = weight_block(p, bench, block);
  if (c.started != nullptr)
    for (i64 d = 0; d < p.depth; d += kPanel)
      interleave(weight.data + d, weight.stride, padded, min_of<i64>(kPanel, p.depth - d),
                 as_units(bench.weight_panels + d * kBlock), kPanel);
  for (i64 group = 0; group < c.groups(); ++group) {
    const Tile tile = gradient_tile(c, bench, group);
    if (c.stored != nullptr) {
      score_gradients<T, true>(p, c, block, group, tile);
    } else {
      group_scores(p, c, weight, block, group, tile);
      score_gradients<T, false>(p, c, block, group, tile);
    }
    pad_tile(tile, rows, padded);  // what the product above wrote there, or what was there before
    if (c.started != nullptr) add_dhidden(p, c, bench, tile, padded, group, partial);
    if (dweight != nullptr) keep_rows(c, bench, tile, padded, group);
    if (c.dbias != nullptr) add_dbias(c, tile, rows, group, c.dbias + block * kBlock);
  }
  if (c.started != nullptr) c.started[partial] = 1;
  if (dweight != nullptr) add_dweight(p, c, bench, block, add, dweight);
}

// A task of the backward pass: a run of blocks whose dhidden is one partial sum.
template <class T>
OFAKERN_LOCAL void gradient_of_run(const Problem<T>& p, Chunk<T>& c, const Workbench<T>& bench, i64 partial, bool add,
                                   T* dweight) {
  if (c.started != nullptr) c.started[partial] = 0;
  const i64 blocks = p.blocks();
  for (i64 block = blocks * partial / kPartials; block < blocks * (partial + 1) / kPartials; ++block)
    gradient_of_block(p, c, bench, block, partial, add, dweight);
}

// The partial sums in their order.
template <class T>
OFAKERN_LOCAL void finish_dhidden(const Problem<T>& p, const Chunk<T>& c, i64 group, T* dhidden) {
  for (i64 t = 0; t < c.group_tokens(group); ++t) {
    const i64 token = group * kGroup + t;
    T* out = dhidden + c.row(token) * p.width;
    for (i64 d = 0; d < p.width; d += kWidth) {
      Vec sum = vzero();
      for (i64 partial = 0; partial < kPartials; ++partial)
        if (c.started[partial] != 0) sum = vadd(sum, vload(c.dhidden[partial] + token * p.depth + d));
      vstore_n(out + d, sum, p.width - d);
    }
  }
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

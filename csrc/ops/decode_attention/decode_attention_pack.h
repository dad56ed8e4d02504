// A sample's keys into blocks and its values into panels; the layout is in decode_attention.h.
#pragma once

#include "core/parallel.h"
#include "ops/decode_attention/decode_attention_tiles.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// Rows of kBlock keys, zero where there are none.
template <class S>
struct BlockRows {
  alignas(64) S row[kBlock][kDecodeMaxWidth];

  void read(const S* src, i64 stride, i64 keys, i64 width, i64 padded) {
    for (i64 r = 0; r < kBlock; ++r) {
      const i64 given = r < keys ? width : 0;
      std::memcpy(static_cast<void*>(row[r]), src + r * stride, static_cast<std::size_t>(given) * sizeof(S));
      zero_row(row[r] + given, padded - given);
    }
  }
};

// [kBlock, width] to [width / step][kBlock][step].
template <class S>
OFAKERN_HOT void put_keys(const BlockRows<S>& block, i64 width, S* dst) {
  for (i64 d = 0; d < width; ++d)
    for (i64 r = 0; r < kBlock; ++r) dst[d * kBlock + r] = block.row[r][d];
}
OFAKERN_HOT void put_keys(const BlockRows<float>& block, i64 width, float* dst) {
  transpose_units(as_units(block.row[0]), kDecodeMaxWidth, kBlock, width, as_units(dst), kBlock);
}
OFAKERN_HOT void put_keys(const BlockRows<bf16>& block, i64 width, bf16* dst) {
  transpose_units(as_units(block.row[0]), kDecodeMaxWidth / 2, kBlock, width / 2, as_units(dst), kBlock);
}

// Columns of one panel, [kBlock keys, kBlock columns] to [keys / step][kBlock][step].
template <class S>
OFAKERN_HOT void put_values(const BlockRows<S>& block, i64 column, S* dst) {
  for (i64 r = 0; r < kBlock; ++r)
    std::memcpy(static_cast<void*>(dst + r * kBlock), block.row[r] + column, kBlock * sizeof(S));
}
OFAKERN_HOT void put_values(const BlockRows<bf16>& block, i64 column, bf16* dst) {
  interleave(block.row[0] + column, kDecodeMaxWidth, kBlock, kBlock, as_units(dst), kBlock);
}

// Where the tokens of a sample stand in k and v, and where its blocks go.
struct PackedSample {
  i64 row, first, count, padded;
};

// One block of keys of one sample, all heads: the rows of k and v are read as they stand, one after the other.
template <class S>
OFAKERN_LOCAL void pack_block(const TensorView& k, const TensorView& v, const PackedSample& sample, i64 key, S* keys,
                              S* values) {
  const i64 heads = k.shape[1];
  const i64 key_width = packed_key_width(k.shape[2], k.dtype), columns = packed_value_width(v.shape[2]);
  const i64 left = min_of(kBlock, sample.count - key), row = sample.row + key;
  BlockRows<S> block;
  for (i64 head = 0; head < heads; ++head) {
    const i64 base = sample.first * heads + head * sample.padded;
    block.read(k.as<const S>() + row * k.stride[0] + head * k.stride[1], k.stride[0], left, k.shape[2], key_width);
    put_keys(block, key_width, keys + (base + key) * key_width);
  }
  for (i64 head = 0; head < heads; ++head) {
    const i64 base = sample.first * heads + head * sample.padded;
    block.read(v.as<const S>() + row * v.stride[0] + head * v.stride[1], v.stride[0], left, v.shape[2], columns);
    for (i64 x = 0; x < columns; x += kBlock)
      put_values(block, x, values + base * columns + x * sample.padded + key * kBlock);
  }
}

template <class S>
OFAKERN_LOCAL void pack(const TensorView& k, const TensorView& v, const TensorView& runs, S* keys, S* values,
                        int threads) {
  const std::int32_t* run = runs.as<const std::int32_t>();
  i64 row = 0;
  for (i64 b = 0; b < runs.shape[0]; ++b) {
    const i64 count = run[2 * b + 1];
    const PackedSample sample = {row, run[2 * b], count, round_up(count, kBlock)};
    parallel_for(sample.padded / kBlock, threads,
                 [&](i64 task, int) { pack_block(k, v, sample, task * kBlock, keys, values); });
    row += count;
  }
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

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

template <class S>
OFAKERN_LOCAL void pack_sample_head(const TensorView& k, const TensorView& v, i64 row, i64 head, i64 count, S* keys,
                                    S* values) {
  const i64 key_width = packed_key_width(k.shape[2], k.dtype), columns = packed_value_width(v.shape[2]);
  const i64 padded = round_up(count, kBlock);
  BlockRows<S> block;
  for (i64 key = 0; key < padded; key += kBlock) {
    const i64 left = min_of(kBlock, count - key);
    block.read(k.as<const S>() + (row + key) * k.stride[0] + head * k.stride[1], k.stride[0], left, k.shape[2],
               key_width);
    put_keys(block, key_width, keys + key * key_width);
    block.read(v.as<const S>() + (row + key) * v.stride[0] + head * v.stride[1], v.stride[0], left, v.shape[2],
               columns);
    for (i64 x = 0; x < columns; x += kBlock) put_values(block, x, values + x * padded + key * kBlock);
  }
}

template <class S>
OFAKERN_LOCAL void pack(const TensorView& k, const TensorView& v, const TensorView& runs, S* keys, S* values,
                        int threads) {
  const i64 heads = k.shape[1], samples = runs.shape[0];
  const i64 key_width = packed_key_width(k.shape[2], k.dtype), columns = packed_value_width(v.shape[2]);
  const std::int32_t* run = runs.as<const std::int32_t>();
  parallel_for(samples * heads, threads, [&](i64 task, int) {
    const i64 b = task / heads, head = task % heads;
    i64 row = 0;
    for (i64 before = 0; before < b; ++before) row += run[2 * before + 1];
    const i64 base = run[2 * b] * heads + head * round_up(run[2 * b + 1], kBlock);
    pack_sample_head(k, v, row, head, run[2 * b + 1], keys + base * key_width, values + base * columns);
  });
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

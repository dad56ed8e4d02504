// Keys and values of a source straight from the product that makes them: each block of rows is multiplied, rounded and
// packed while it is in the second-level cache.
#pragma once

#include "core/gemm_driver.h"
#include "ops/decode_attention/decode_attention_pack.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// The product's rows: kBlock for every block of keys, those behind a sample's last key are zero.
struct SourceRows {
  const std::int32_t* runs;
  i64 samples;

  i64 count() const {
    i64 rows = 0;
    for (i64 b = 0; b < samples; ++b) rows += round_up(runs[2 * b + 1], kBlock);
    return rows;
  }

  // Whose the block is that begins at `row`, and its first key there.
  PackedSample sample_at(i64 row, i64* key) const {
    PackedSample sample = {};
    for (i64 b = 0; b < samples; ++b, row -= sample.padded, sample.row += sample.count) {
      const i64 count = runs[2 * b + 1];
      sample = {sample.row, runs[2 * b], count, round_up(count, kBlock)};
      if (row < sample.padded) break;
    }
    *key = row;
    return sample;
  }
};

// gemm_driver's prologue.
template <class T>
struct CopyStates {
  const T* states;
  i64 stride, depth;
  SourceRows source;

  template <class Elem>
  void operator()(i64 row, i64 rows, Elem* dst, i64 ld) const {
    for (i64 r = 0; r < rows; r += kBlock) copy_block(row + r, dst + r * ld, ld);
  }

  template <class Elem>
  void copy_block(i64 row, Elem* dst, i64 ld) const {
    i64 key;
    const PackedSample sample = source.sample_at(row, &key);
    const i64 left = min_of(kBlock, sample.count - key);
    const T* from = states + (sample.row + key) * stride;
    for (i64 r = 0; r < left; ++r) copy_row(from + r * stride, depth, dst + r * ld, packed_depth<Elem>(depth));
    for (i64 r = left; r < kBlock; ++r) zero_row(dst + r * ld, packed_depth<Elem>(depth));
  }
};

// gemm_driver's epilogue: all heads of keys, then all heads of values.
template <class T>
struct PackProjected {
  i64 heads, key_width, value_width;
  i64 padded_keys, columns;  // both widths as stored
  const float* bias;         // or null
  SourceRows source;
  T *keys, *values;

  void operator()(i64 row, i64 rows, i64, i64, const float* c, i64 ldc) const {
    for (i64 r = 0; r < rows; r += kBlock) pack(row + r, c + r * ldc, ldc);
  }

  void pack(i64 row, const float* c, i64 ldc) const {
    i64 key;
    const PackedSample sample = source.sample_at(row, &key);
    const i64 left = min_of(kBlock, sample.count - key);
    BlockRows<T> block;
    for (i64 head = 0; head < heads; ++head) {
      const i64 base = sample.first * heads + head * sample.padded;
      round(c, ldc, head * key_width, key_width, padded_keys, left, &block);
      put_keys(block, padded_keys, keys + (base + key) * padded_keys);
      round(c, ldc, heads * key_width + head * value_width, value_width, columns, left, &block);
      for (i64 x = 0; x < columns; x += kBlock)
        put_values(block, x, values + base * columns + x * sample.padded + key * kBlock);
    }
  }

  // Columns [column, column + width) of the first `left` rows, zeros around them.
  void round(const float* c, i64 ldc, i64 column, i64 width, i64 padded, i64 left, BlockRows<T>* block) const {
    for (i64 r = 0; r < kBlock; ++r) {
      T* row = block->row[r];
      if (r < left) {
        for (i64 x = 0; x < width; x += kWidth) {
          Vec y = vload_n(c + r * ldc + column + x, width - x);
          if (bias != nullptr) y = vadd(y, vload_n(bias + column + x, width - x));
          vstore_n(row + x, y, width - x);
        }
      }
      const i64 given = r < left ? width : 0;
      zero_row(row + given, padded - given);
    }
  }
};

// Blocks of whole rows: a head's columns stay together, and a block of keys in one task.
template <class T>
OFAKERN_LOCAL MatmulPlan<Packed<T>> projection_plan(const SourceProjection& in) {
  const i64 n = in.heads * (in.key_width + in.value_width);
  const i64 rows = SourceRows{in.runs.as<const std::int32_t>(), in.runs.shape[0]}.count();
  MatmulPlan<Packed<T>> plan = plan_matmul<Packed<T>>(max_of(rows, kSkinnyRows + 1), n, in.states.shape[1], true);
  plan.m = rows;
  plan.rows = plan.rows / kBlock * kBlock;
  return plan;
}

template <class T>
OFAKERN_LOCAL void project(const SourceProjection& in, const T* panels, T* keys, T* values, void* scratch,
                           int threads) {
  const SourceRows rows = {in.runs.as<const std::int32_t>(), in.runs.shape[0]};
  const MatmulPlan<Packed<T>> plan = projection_plan<T>(in);
  multiply(plan, make_weight<Packed<T>, T>(panels, plan.n, plan.k), scratch, threads,
           CopyStates<T>{in.states.as<const T>(), in.states.stride[0], plan.k, rows},
           PackProjected<T>{in.heads, in.key_width, in.value_width, packed_key_width(in.key_width, in.states.dtype),
                            packed_value_width(in.value_width), in.bias.as<const float>(), rows, keys, values});
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

// What the CUDA kernels of decode_attention share: the call, a sample's keys, and how results over parts of the keys
// are written and merged.
//
// Scores are kept in powers of two: exp2(score - largest). Integers inside the tables are clipped to the tensors: a
// wrong table gives a wrong result and reads nothing outside.
#pragma once

#include "core/simt.h"
#include "ops/decode_attention/decode_attention.h"

namespace ofakern {
namespace {

using namespace simt;
using i64 = std::int64_t;

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kNever = -INFINITY;

struct AttendCall {
  const void *q, *keys, *values;
  const float *key_scales, *value_scales;  // [S, H] of int8
  const int *row_offsets, *runs, *slots, *counts;
  const float *bias, *head_scale;
  void* out;
  float* lse;
  float* parts;  // [splits, R, H, Kv + 2]: sums relative to the largest score, that score, the sum of weights
  i64 slots_stride, bias_stride, bias_columns;
  int room;  // keys in storage
  int samples, rows, heads, width, value_width, steps;
  int chunk, splits, row_parts;
  float scale;
  DType dtype;   // of q and out
  bool aligned;  // 8 elements of a key or value are one load
  bool narrow;   // no row has more keys than one warp takes
};

// A sample's rows and keys. bias_from: where its columns begin.
struct SampleKeys {
  int begin, end, first, count;
  i64 bias_from;
};

__device__ __forceinline__ int clip(int x, int lo, int hi) { return x < lo ? lo : (x > hi ? hi : x); }

__device__ __forceinline__ int count_of(const AttendCall& c, int sample) {
  if (c.runs == nullptr) return clip(c.counts[sample], 0, c.steps);
  const int first = c.runs[2 * sample];
  return first < 0 || first > c.room ? 0 : clip(c.runs[2 * sample + 1], 0, c.room - first);
}

__device__ __forceinline__ i64 sum_of_lanes(i64 v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

// The keys of samples before this one. For whole warps.
__device__ __forceinline__ i64 keys_before(const AttendCall& c, int sample) {
  i64 sum = 0;
  for (int b = lane(); b < sample; b += 32) sum += count_of(c, b);
  return sum_of_lanes(sum);
}

__device__ __forceinline__ SampleKeys keys_of(const AttendCall& c, int sample) {
  SampleKeys s;
  s.begin = clip(c.row_offsets[sample], 0, c.rows);
  s.end = clip(c.row_offsets[sample + 1], s.begin, c.rows);
  s.first = c.runs == nullptr ? 0 : c.runs[2 * sample];
  s.count = count_of(c, sample);
  s.bias_from = c.bias == nullptr ? 0 : keys_before(c, sample);
  // A bias with too few columns (the caller's tables do not agree) hides the keys behind it.
  if (c.bias != nullptr && s.bias_from + s.count > c.bias_columns)
    s.count = static_cast<int>(max(c.bias_columns - s.bias_from, static_cast<i64>(0)));
  return s;
}

// The sample that a row belongs to, -1 for none. For whole warps.
__device__ __forceinline__ int sample_of(const AttendCall& c, int row) {
  for (int from = 0; from < c.samples; from += 32) {
    const int b = from + lane();
    const unsigned found = ballot(b < c.samples && c.row_offsets[b] <= row && row < c.row_offsets[b + 1]);
    if (found != 0) return from + __ffs(static_cast<int>(found)) - 1;
  }
  return -1;
}

__device__ __forceinline__ int splits_of(const AttendCall& c, int count) { return (count + c.chunk - 1) / c.chunk; }

__device__ __forceinline__ float read(const void* x, DType dtype, i64 at) {
  if (dtype == DType::f32) return static_cast<const float*>(x)[at];
  return dtype == DType::bf16 ? to_float(static_cast<const __nv_bfloat16*>(x)[at])
                              : to_float(static_cast<const __half*>(x)[at]);
}

__device__ __forceinline__ void write(void* x, DType dtype, i64 at, float value) {
  if (dtype == DType::f32)
    static_cast<float*>(x)[at] = value;
  else if (dtype == DType::bf16)
    static_cast<__nv_bfloat16*>(x)[at] = from_float<__nv_bfloat16>(value);
  else
    static_cast<__half*>(x)[at] = from_float<__half>(value);
}

// What scores are taken relative to: 0 where there is no key.
__device__ __forceinline__ float reference_of(float largest) { return largest == kNever ? 0.0f : largest; }

__device__ __forceinline__ float* part_of(const AttendCall& c, int split, int row, int head) {
  return c.parts + ((static_cast<i64>(split) * c.rows + row) * c.heads + head) * (c.value_width + 2);
}

// One number of the result: a finished one, or a split's.
__device__ __forceinline__ void put(const AttendCall& c, bool whole, int split, int row, int head, int column,
                                    float sum, float weights) {
  if (!whole) {
    part_of(c, split, row, head)[column] = sum;
    return;
  }
  const float mean = weights > 0 || weights != weights ? sum / weights : 0.0f;
  const float scaled = c.head_scale == nullptr ? mean : mean * c.head_scale[head];
  write(c.out, c.dtype, (static_cast<i64>(row) * c.heads + head) * c.value_width + column, scaled);
}

__device__ __forceinline__ void put_statistics(const AttendCall& c, bool whole, int split, int row, int head,
                                               float largest, float weights) {
  if (whole) {
    c.lse[static_cast<i64>(row) * c.heads + head] =
        weights == 0 ? kNever : (reference_of(largest) + log2f(weights)) * kLn2;
    return;
  }
  float* statistics = part_of(c, split, row, head) + c.value_width;
  statistics[0] = largest;
  statistics[1] = weights;
}

// Merges the splits of one row and head, in order: a warp each. Rows of one split are finished already.
__global__ void __launch_bounds__(128) merge_splits(const AttendCall c) {
  const i64 pair = static_cast<i64>(blockIdx.x) * (blockDim.x / 32) + warp();
  if (pair >= static_cast<i64>(c.rows) * c.heads) return;
  const int row = static_cast<int>(pair / c.heads), head = static_cast<int>(pair % c.heads);
  const int sample = sample_of(c, row);
  const int splits = sample < 0 ? 0 : splits_of(c, count_of(c, sample));
  if (splits <= 1) return;
  float largest = kNever, weights = 0.0f;
  for (int s = 0; s < splits; ++s) largest = fmaxf(largest, part_of(c, s, row, head)[c.value_width]);
  const float from = reference_of(largest);
  for (int s = 0; s < splits; ++s) {
    const float* statistics = part_of(c, s, row, head) + c.value_width;
    weights += statistics[1] * exp2f(statistics[0] - from);
  }
  for (int column = lane(); column < c.value_width; column += 32) {
    float sum = 0.0f;
    for (int s = 0; s < splits; ++s) {
      const float* part = part_of(c, s, row, head);
      sum += part[column] * exp2f(part[c.value_width] - from);
    }
    put(c, true, 0, row, head, column, sum, weights);
  }
  if (lane() == 0) put_statistics(c, true, 0, row, head, largest, weights);
}

}  // namespace
}  // namespace ofakern

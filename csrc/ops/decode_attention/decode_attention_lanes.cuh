// Any dtype, width and kind of cache: products by fused multiply-adds, a few lanes to a key, 8 elements to a lane.
//
// A warp takes 64 keys of at most kRows rows and one head. Of a source kRows is 8 (the beams share what is loaded); of
// slots it is 1, for every row has its own keys. Lanes that hold the same part of different keys keep sums of their own
// until the end. Which keys a warp takes and in which order results merge follows from the keys' number alone.
#pragma once

#include "ops/decode_attention/decode_attention_call.cuh"

namespace ofakern {
namespace {

constexpr int kLaneWarps = 4, kWarpKeys = 64, kLaneElements = 8;
constexpr int kLaneChunk = kLaneWarps * kWarpKeys;
constexpr int kSharedRows = 8;  // rows of a source that are answered at once

template <class S>
struct Stored {
  static constexpr int kWords = kLaneElements * static_cast<int>(sizeof(S)) / 4;
  unsigned words[kWords];
};

__device__ __forceinline__ unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ unsigned bits_of(std::int8_t x) { return static_cast<std::uint8_t>(x); }
__device__ __forceinline__ unsigned bits_of(__nv_bfloat16 x) { return *reinterpret_cast<const std::uint16_t*>(&x); }
__device__ __forceinline__ unsigned bits_of(__half x) { return *reinterpret_cast<const std::uint16_t*>(&x); }

// `count` (0 to 8) elements; zeros behind them. aligned: as one or two loads, count is 0 or 8.
template <class S>
__device__ __forceinline__ Stored<S> load_elements(const S* from, int count, bool aligned) {
  Stored<S> x = {};
  if (aligned) {
    if (count == 0) return x;
    if constexpr (sizeof(S) == 1) {
      const uint2 bits = *reinterpret_cast<const uint2*>(from);
      x.words[0] = bits.x;
      x.words[1] = bits.y;
    } else {
#pragma unroll
      for (int i = 0; i < Stored<S>::kWords / 4; ++i) {
        const uint4 bits = reinterpret_cast<const uint4*>(from)[i];
        x.words[4 * i] = bits.x;
        x.words[4 * i + 1] = bits.y;
        x.words[4 * i + 2] = bits.z;
        x.words[4 * i + 3] = bits.w;
      }
    }
    return x;
  }
#pragma unroll
  for (int e = 0; e < kLaneElements; ++e) {
    constexpr int per_word = 4 / static_cast<int>(sizeof(S));
    if (e < count) x.words[e / per_word] |= bits_of(from[e]) << (e % per_word * 8 * static_cast<int>(sizeof(S)));
  }
  return x;
}

__device__ __forceinline__ float element(const Stored<float>& x, int e) { return __uint_as_float(x.words[e]); }
__device__ __forceinline__ float element(const Stored<__nv_bfloat16>& x, int e) {
  return __uint_as_float((e & 1) != 0 ? x.words[e / 2] & 0xFFFF0000u : x.words[e / 2] << 16);
}
__device__ __forceinline__ float element(const Stored<__half>& x, int e) {
  const std::uint16_t bits = static_cast<std::uint16_t>(x.words[e / 2] >> (e & 1) * 16);
  return to_float(*reinterpret_cast<const __half*>(&bits));
}
__device__ __forceinline__ float element(const Stored<std::int8_t>& x, int e) {
  return static_cast<float>(static_cast<std::int8_t>(x.words[e / 4] >> (e & 3) * 8));
}

// Lanes to a key: a power of two.
__device__ __forceinline__ int lanes_of(const AttendCall& c) {
  const int parts = (max(c.width, c.value_width) + kLaneElements - 1) / kLaneElements;
  int lanes = 1;
  while (lanes < parts) lanes *= 2;
  return lanes;
}

template <int kRows>
struct LaneState {
  float q[kRows][kLaneElements], sums[kRows][kLaneElements], largest[kRows], weights[kRows];
};

// Where one warp finds its keys: j-th key -> slot, -1 for none. row: of the table, where there is one.
struct LaneKeys {
  const AttendCall& c;
  SampleKeys sample;
  int row, head, end;

  __device__ int slot_of(int key) const {
    if (key >= end) return -1;
    if (c.slots == nullptr) return sample.first + key;
    const int slot = c.slots[row * c.slots_stride + key];
    return slot >= 0 && slot < c.room ? slot : -1;
  }
  __device__ float bias(int key) const {
    return c.bias == nullptr || key >= end ? 0.0f : c.bias[head * c.bias_stride + sample.bias_from + key];
  }
};

__device__ __forceinline__ int inside(int width, int at) { return clip(width - at, 0, kLaneElements); }

// kAhead keys of every group of lanes, whose loads are all on their way before the first is used.
template <class S, int kRows, int kAhead>
__device__ __forceinline__ void pass_some(const LaneKeys& k, int first_key, int lanes, LaneState<kRows>& state) {
  const AttendCall& c = k.c;
  const int at = lane() % lanes * kLaneElements, groups = 32 / lanes;
  Stored<S> keys[kAhead], values[kAhead];
  float bias[kAhead], key_scale[kAhead], value_scale[kAhead];
  int slot[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) slot[i] = k.slot_of(first_key + i * groups + lane() / lanes);
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const bool seen = slot[i] >= 0;
    const i64 place = static_cast<i64>(seen ? slot[i] : 0) * c.heads + k.head;
    keys[i] =
        load_elements(static_cast<const S*>(c.keys) + place * c.width + at, seen ? inside(c.width, at) : 0, c.aligned);
    values[i] = load_elements(static_cast<const S*>(c.values) + place * c.value_width + at,
                              seen ? inside(c.value_width, at) : 0, c.aligned);
    bias[i] = k.bias(first_key + i * groups + lane() / lanes);
    key_scale[i] = c.key_scales == nullptr || !seen ? 1.0f : c.key_scales[place];
    value_scale[i] = c.value_scales == nullptr || !seen ? 1.0f : c.value_scales[place];
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float scores[kAhead];
    float largest = state.largest[r];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float product = 0.0f;
#pragma unroll
      for (int e = 0; e < kLaneElements; ++e) product = fmaf(state.q[r][e], element(keys[i], e), product);
      for (int mask = lanes / 2; mask > 0; mask /= 2) product += shuffle_xor(product, mask);
      scores[i] = slot[i] < 0 ? kNever : fmaf(product * key_scale[i], c.scale, bias[i]) * kLog2E;
      largest = scores[i] > largest || scores[i] != scores[i] ? scores[i] : largest;
    }
    const float from = reference_of(largest), rescale = exp2f(state.largest[r] - from);
    state.largest[r] = largest;
    state.weights[r] *= rescale;
#pragma unroll
    for (int e = 0; e < kLaneElements; ++e) state.sums[r][e] *= rescale;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const float weight = exp2f(scores[i] - from), scaled = weight * value_scale[i];
      state.weights[r] += weight;
#pragma unroll
      for (int e = 0; e < kLaneElements; ++e) state.sums[r][e] = fmaf(scaled, element(values[i], e), state.sums[r][e]);
    }
  }
}

// Groups of lanes become one: every lane has the warp's results of its part of the columns.
template <int kRows>
__device__ __forceinline__ void merge_lanes(int lanes, LaneState<kRows>& state) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float largest = state.largest[r];
    for (int mask = lanes; mask < 32; mask *= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
    const float factor = exp2f(state.largest[r] - reference_of(largest));
    state.largest[r] = largest;
    state.weights[r] *= factor;
    for (int mask = lanes; mask < 32; mask *= 2) state.weights[r] += shuffle_xor(state.weights[r], mask);
#pragma unroll
    for (int e = 0; e < kLaneElements; ++e) {
      state.sums[r][e] *= factor;
      for (int mask = lanes; mask < 32; mask *= 2) state.sums[r][e] += shuffle_xor(state.sums[r][e], mask);
    }
  }
}

// Of one warp: `rows` rows from first_row on, the keys [begin, k.end).
template <class S, int kRows>
__device__ __forceinline__ void pass_warp(const LaneKeys& k, int begin, int first_row, int rows, int lanes,
                                          LaneState<kRows>& state) {
  constexpr int kAhead = kRows == 1 ? 4 : 1;
  const AttendCall& c = k.c;
  const int at = lane() % lanes * kLaneElements;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    state.largest[r] = kNever;
    state.weights[r] = 0.0f;
#pragma unroll
    for (int e = 0; e < kLaneElements; ++e) {
      state.sums[r][e] = 0.0f;
      const bool given = r < rows && at + e < c.width;
      state.q[r][e] =
          given ? read(c.q, c.dtype, (static_cast<i64>(first_row + r) * c.heads + k.head) * c.width + at + e) : 0.0f;
    }
  }
  for (int key = begin; key < k.end; key += kAhead * (32 / lanes)) pass_some<S, kRows, kAhead>(k, key, lanes, state);
  merge_lanes<kRows>(lanes, state);
}

// A warp's own result is a finished one: it had all keys.
template <int kRows>
__device__ __forceinline__ void put_warp(const AttendCall& c, const LaneState<kRows>& state, int first_row, int rows,
                                         int head, int lanes) {
  if (lane() >= lanes) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) continue;
#pragma unroll
    for (int e = 0; e < kLaneElements; ++e) {
      const int column = lane() * kLaneElements + e;
      if (column < c.value_width) put(c, true, 0, first_row + r, head, column, state.sums[r][e], state.weights[r]);
    }
    if (lane() == 0) put_statistics(c, true, 0, first_row + r, head, state.largest[r], state.weights[r]);
  }
}

// The warps' results, merged in their order.
template <int kRows>
__device__ __forceinline__ void put_block(const AttendCall& c, const LaneState<kRows>& state, bool whole, int split,
                                          int first_row, int rows, int head, int lanes) {
  OFAKERN_SHARED(float, sums, kLaneWarps * kRows * 256);
  OFAKERN_SHARED(float, statistics, kLaneWarps * kRows * 2);
  if (lane() < lanes) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int e = 0; e < kLaneElements; ++e)
        sums[(warp() * kRows + r) * 256 + lane() * kLaneElements + e] = state.sums[r][e];
  }
  if (lane() == 0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      statistics[2 * (warp() * kRows + r)] = state.largest[r];
      statistics[2 * (warp() * kRows + r) + 1] = state.weights[r];
    }
  }
  sync_block();
  for (int at = static_cast<int>(threadIdx.x); at < rows * c.value_width; at += kLaneWarps * 32) {
    const int r = at / c.value_width, column = at % c.value_width;
    float largest = kNever, sum = 0.0f, weights = 0.0f;
#pragma unroll
    for (int w = 0; w < kLaneWarps; ++w) largest = fmaxf(largest, statistics[2 * (w * kRows + r)]);
    const float from = reference_of(largest);
#pragma unroll
    for (int w = 0; w < kLaneWarps; ++w) {
      const float factor = exp2f(statistics[2 * (w * kRows + r)] - from);
      sum += sums[(w * kRows + r) * 256 + column] * factor;
      weights += statistics[2 * (w * kRows + r) + 1] * factor;
    }
    put(c, whole, split, first_row + r, head, column, sum, weights);
    if (column == 0) put_statistics(c, whole, split, first_row + r, head, largest, weights);
  }
  sync_block();
}

// A block's place in the grid: heads inside splits inside rows (or parts of a sample's rows).
struct LanePlace {
  int head, split, outer;
  bool heads_left;
};
__device__ __forceinline__ LanePlace place_of(const AttendCall& c) {
  const unsigned per_row = static_cast<unsigned>(c.narrow ? (c.heads + kLaneWarps - 1) / kLaneWarps : c.heads);
  unsigned at = blockIdx.x;
  LanePlace p;
  p.head = c.narrow ? static_cast<int>(at % per_row) * kLaneWarps + warp() : static_cast<int>(at % per_row);
  at /= per_row;
  p.split = static_cast<int>(at % static_cast<unsigned>(c.splits));
  p.outer = static_cast<int>(at / static_cast<unsigned>(c.splits));
  p.heads_left = p.head < c.heads;
  return p;
}

template <class S, int kRows>
__device__ __forceinline__ void attend_rows(const AttendCall& c, const SampleKeys& sample, const LanePlace& p,
                                            int first_row, int rows) {
  const int lanes = lanes_of(c), begin = p.split * kLaneChunk + (c.narrow ? 0 : warp() * kWarpKeys);
  const LaneKeys keys = {c, sample, first_row, p.head, min(sample.count, begin + kWarpKeys)};
  LaneState<kRows> state;
  pass_warp<S, kRows>(keys, begin, first_row, rows, lanes, state);
  if (c.narrow)
    put_warp<kRows>(c, state, first_row, rows, p.head, lanes);
  else
    put_block<kRows>(c, state, splits_of(c, sample.count) <= 1, p.split, first_row, rows, p.head, lanes);
}

// One block (narrow: one warp) for each row, split and head. A row that no sample has sees no keys. The bound for int8:
// ptxas spills a word on sm_80 without one.
template <class S>
__global__ void __launch_bounds__(kLaneWarps * 32, sizeof(S) == 1 ? 5 : 1) attend_slots(const AttendCall c) {
  const LanePlace p = place_of(c);
  if (!p.heads_left) return;
  const int found = sample_of(c, p.outer);
  const SampleKeys sample = found < 0 ? SampleKeys{0, 0, 0, 0, 0} : keys_of(c, found);
  if (p.split > 0 && p.split >= splits_of(c, sample.count)) return;
  attend_rows<S, 1>(c, sample, p, p.outer, 1);
}

// One block (narrow: one warp) for each part of a sample's rows, split and head.
template <class S>
__global__ void __launch_bounds__(kLaneWarps * 32) attend_source(const AttendCall c) {
  const LanePlace p = place_of(c);
  if (!p.heads_left) return;
  const SampleKeys sample = keys_of(c, p.outer / c.row_parts);
  if (p.split > 0 && p.split >= splits_of(c, sample.count)) return;
  for (int row = sample.begin + p.outer % c.row_parts * kSharedRows; row < sample.end; row += c.row_parts * kSharedRows)
    attend_rows<S, kSharedRows>(c, sample, p, row, min(sample.end - row, kSharedRows));
}

}  // namespace
}  // namespace ofakern

// All beams of a sample against one head's keys in one pass: products of tensor cores, 16 rows at a time.
//
// A block takes one head and at most kBeamChunk keys of a sample, a warp every eighth tile of 16 of them. Nothing goes
// through shared memory before the end: a lane loads 16 bytes of a key or value straight into the registers from which
// mma reads them. That works because a product does not mind the order of its depth and a result not the order of its
// columns: depth slots {2t, 2t + 1, 2t + 8, 2t + 9} of lane t (of 4) are four elements that stand together, and column
// slot g (of 8) of the i-th product is column 8 g + i. The order of the keys' sums is fixed by their number.
#pragma once

#include "ops/decode_attention/decode_attention_call.cuh"

namespace ofakern {
namespace {

constexpr int kBeamWarps = 8, kBeamRows = 16, kBeamTile = 16;
constexpr int kBeamChunk = 1024;

// Eight elements as stored, loaded at once.
template <class S>
struct Eight {
  uint4 bits;
};
template <>
struct Eight<std::int8_t> {
  uint2 bits;
};

template <class S>
__device__ __forceinline__ Eight<S> load_eight(const S* from, bool valid) {
  Eight<S> x = {};
  if (valid) x.bits = *reinterpret_cast<const decltype(x.bits)*>(from);
  return x;
}

__device__ __forceinline__ unsigned pair_of(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}
__device__ __forceinline__ unsigned pair_of(float low, float high, __half) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}

// Byte i of a word as a signed number: 2^23 + 128 is added and taken away, which is cheaper than a conversion.
__device__ __forceinline__ float byte_of(unsigned word, int i) {
  return __uint_as_float(0x4B000000u | ((word >> (8 * i) & 0xFFu) ^ 0x80u)) - 8388736.0f;
}

// The elements 2 i and 2 i + 1 as the products take them.
template <class E>
__device__ __forceinline__ unsigned elements(const Eight<E>& x, int i) {
  return i == 0 ? x.bits.x : (i == 1 ? x.bits.y : (i == 2 ? x.bits.z : x.bits.w));
}
template <class E>
__device__ __forceinline__ unsigned elements(const Eight<std::int8_t>& x, int i) {
  const unsigned word = i < 2 ? x.bits.x : x.bits.y;
  return pair_of(byte_of(word, 2 * (i & 1)), byte_of(word, 2 * (i & 1) + 1), E{});
}

// What one warp has of its rows g and g + 8 (g = lane / 4) so far.
template <int kWidth>
struct BeamState {
  float largest[2] = {kNever, kNever}, weights[2] = {0.0f, 0.0f};
  float sums[kWidth / 8][4] = {};
};

// What a block works on. It stands in shared memory: registers are for what is on its way.
struct BeamPlace {
  SampleKeys sample;
  int head, split, part;
};

__device__ __forceinline__ BeamPlace beam_place(const AttendCall& c) {
  BeamPlace p;
  unsigned at = blockIdx.x;
  p.head = static_cast<int>(at % static_cast<unsigned>(c.heads));
  at /= static_cast<unsigned>(c.heads);
  p.split = static_cast<int>(at % static_cast<unsigned>(c.splits));
  at /= static_cast<unsigned>(c.splits);
  p.part = static_cast<int>(at % static_cast<unsigned>(c.row_parts));
  p.sample = keys_of(c, static_cast<int>(at / static_cast<unsigned>(c.row_parts)));
  return p;
}

// One head's keys of a sample, as a lane sees them. Registers are what limits this kernel: two pointers move, all else
// follows from them and the number of the key.
template <class S>
struct BeamKeys {
  const AttendCall& c;
  const S *keys, *values;  // of the tile's first key
  i64 bias_from;           // its column of the bias, less its number
  int place;               // its slot in the cache, less its number
  int head, now, end;      // its number; keys from `end` on are another block's

  __device__ BeamKeys(const AttendCall& call, const BeamPlace& p)
      : c(call),
        bias_from(p.head * call.bias_stride + p.sample.bias_from),
        place(p.sample.first),
        head(p.head),
        now(p.split * kBeamChunk + warp() * kBeamTile),
        end(min(p.sample.count, (p.split + 1) * kBeamChunk)) {
    const i64 at = static_cast<i64>(place + now) * call.heads + head;
    keys = static_cast<const S*>(call.keys) + at * call.width;
    values = static_cast<const S*>(call.values) + at * call.value_width;
  }

  __device__ void next() {
    constexpr int keys_on = kBeamWarps * kBeamTile;
    keys += static_cast<i64>(keys_on) * c.heads * c.width;
    values += static_cast<i64>(keys_on) * c.heads * c.value_width;
    now += keys_on;
  }
  __device__ bool seen(int at) const { return now + at < end; }
  __device__ Eight<S> key(int at, int column) const {
    return load_eight(keys + (at * c.heads * c.width + column), seen(at) && column < c.width);
  }
  __device__ Eight<S> value(int at, int column) const {
    return load_eight(values + (at * c.heads * c.value_width + column), seen(at) && column < c.value_width);
  }
  __device__ float bias(int at) const {
    return c.bias != nullptr && now + at < end ? c.bias[bias_from + (now + at)] : 0.0f;
  }
  __device__ float scale_of(const float* scales, int at) const {
    return seen(at) ? scales[static_cast<i64>(place + now + at) * c.heads + head] : 1.0f;
  }
};

// Scores of a tile become weights: the products' operand, and what the sums so far are multiplied by.
template <class E, class S>
__device__ __forceinline__ void weigh(const BeamKeys<S>& k, const float (&bias)[4], const int (&at)[4],
                                      float (&scores)[2][4], float (&largest)[2], float (&weights)[2],
                                      unsigned (&operand)[4], float (&rescale)[2]) {
  float own_scale[4], value_scale[4], lifted[4] = {};
  if constexpr (std::is_same_v<S, std::int8_t>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      own_scale[i] = k.scale_of(k.c.key_scales, at[i]);
      value_scale[i] = k.scale_of(k.c.value_scales, at[i]);
      lifted[i] = log2f(value_scale[i]);  // a value's scale is part of its weight
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // rows g, g + 8
    float own[4];
    float most = largest[half];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float product = scores[i / 2][2 * half + (i & 1)];
      if constexpr (std::is_same_v<S, std::int8_t>) product *= own_scale[i];
      own[i] = k.seen(at[i]) ? fmaf(fmaf(product, k.c.scale, bias[i]), kLog2E, lifted[i]) : kNever;
      most = own[i] > most || own[i] != own[i] ? own[i] : most;
    }
    most = fmaxf(most, shuffle_xor(most, 1));
    most = fmaxf(most, shuffle_xor(most, 2));
    const float from = reference_of(most);
    rescale[half] = exp2f(largest[half] - from);
    largest[half] = most;
    float added = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      own[i] = exp2f(own[i] - from);
      if constexpr (std::is_same_v<S, std::int8_t>)
        added += own[i] / value_scale[i];
      else
        added += own[i];
    }
    weights[half] = fmaf(weights[half], rescale[half], added);
    operand[half] = pair_of(own[0], own[1], E{});
    operand[2 + half] = pair_of(own[2], own[3], E{});
  }
}

// A tile's values times its weights.
template <class E, class S, int kWidth>
__device__ __forceinline__ void add_values(const Eight<S> (&v)[kWidth / 64][4], const unsigned (&operand)[4],
                                           const float (&rescale)[2], float (&sums)[kWidth / 8][4]) {
#pragma unroll
  for (int n = 0; n < kWidth / 8; ++n) {
    sums[n][0] *= rescale[0];
    sums[n][1] *= rescale[0];
    sums[n][2] *= rescale[1];
    sums[n][3] *= rescale[1];
  }
#pragma unroll
  for (int group = 0; group < kWidth / 64; ++group) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      unsigned of[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) of[i] = elements<E>(v[group][i], word);
      const unsigned low[2] = {(of[0] & 0xFFFFu) | (of[1] << 16), (of[2] & 0xFFFFu) | (of[3] << 16)};
      const unsigned high[2] = {(of[0] >> 16) | (of[1] & 0xFFFF0000u), (of[2] >> 16) | (of[3] & 0xFFFF0000u)};
      mma_16x8x16<E>(sums[group * 8 + 2 * word], operand, low);
      mma_16x8x16<E>(sums[group * 8 + 2 * word + 1], operand, high);
    }
  }
}

// A lane's part of the rows' queries.
template <class E, int kWidth>
__device__ __forceinline__ void load_queries(const AttendCall& c, int first_row, int rows, int head,
                                             unsigned (&q)[kWidth / 16][4]) {
  const int group = lane() / 4, at = lane() % 4 * 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool given = group + 8 * half < rows;
    const E* row =
        static_cast<const E*>(c.q) + (static_cast<i64>(first_row + group + 8 * half) * c.heads + head) * c.width;
#pragma unroll
    for (int block = 0; block < kWidth / 32; ++block) {
      const Eight<E> x = load_eight(row + block * 32 + at, given && block * 32 + at < c.width);
      q[2 * block][half] = x.bits.x;
      q[2 * block][2 + half] = x.bits.y;
      q[2 * block + 1][half] = x.bits.z;
      q[2 * block + 1][2 + half] = x.bits.w;
    }
  }
}

// A warp's tiles: `k` begins at the first of them.
template <class E, class S, int kWidth>
__device__ __forceinline__ void pass_keys(BeamKeys<S> k, const unsigned (&q)[kWidth / 16][4],
                                          BeamState<kWidth>& state) {
  const int group = lane() / 4, within = lane() % 4;
  const int at[4] = {2 * within, 2 * within + 1, 8 + 2 * within, 9 + 2 * within};  // of the keys whose scores are here
  Eight<S> keys[2][kWidth / 32];
  const auto load_keys = [&](int from) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int block = 0; block < kWidth / 32; ++block)
        keys[n][block] = k.key(from + 8 * n + group, block * 32 + within * 8);
  };
  for (load_keys(0); k.now < k.end; k.next()) {
    Eight<S> values[kWidth / 64][4];
    float bias[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int block = 0; block < kWidth / 64; ++block) values[block][i] = k.value(at[i], block * 64 + group * 8);
      bias[i] = k.bias(at[i]);
    }
    float scores[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int step = 0; step < kWidth / 16; ++step) {
        const unsigned b[2] = {elements<E>(keys[n][step / 2], 2 * (step & 1)),
                               elements<E>(keys[n][step / 2], 2 * (step & 1) + 1)};
        mma_16x8x16<E>(scores[n], q[step], b);
      }
    load_keys(kBeamWarps * kBeamTile);  // the next tile's, on their way while this one's weights are made
    unsigned operand[4];
    float rescale[2];
    weigh<E>(k, bias, at, scores, state.largest, state.weights, operand, rescale);
    add_values<E, S, kWidth>(values, operand, rescale, state.sums);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.weights[half] += shuffle_xor(state.weights[half], 1);
    state.weights[half] += shuffle_xor(state.weights[half], 2);
  }
}

constexpr std::size_t beam_shared_bytes(int width) {
  return sizeof(float) * kBeamWarps * kBeamRows * (static_cast<std::size_t>(width) + 2);
}

// The warps' results, merged in their order.
template <int kWidth>
__device__ __forceinline__ void merge_warps(const AttendCall& c, const BeamState<kWidth>& state, bool whole, int split,
                                            int first_row, int rows, int head) {
  float* sums = reinterpret_cast<float*>(dynamic_shared());    // [warps, 16, width]
  float* statistics = sums + kBeamWarps * kBeamRows * kWidth;  // [warps, 16, 2]
  const int group = lane() / 4, within = lane() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp() * kBeamRows + group + 8 * half;
    if (group + 8 * half >= rows) continue;
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int side = 0; side < 2; ++side)
        sums[row * kWidth + n / 8 * 64 + (2 * within + side) * 8 + n % 8] = state.sums[n][2 * half + side];
    if (within == 0) {
      statistics[2 * row] = state.largest[half];
      statistics[2 * row + 1] = state.weights[half];
    }
  }
  sync_block();
  for (int at = static_cast<int>(threadIdx.x); at < rows * kWidth; at += kBeamWarps * 32) {
    const int row = at / kWidth, column = at % kWidth;
    float largest = kNever, sum = 0.0f, weights = 0.0f;
    for (int w = 0; w < kBeamWarps; ++w) largest = fmaxf(largest, statistics[2 * (w * kBeamRows + row)]);
    const float from = reference_of(largest);
    for (int w = 0; w < kBeamWarps; ++w) {
      const float factor = exp2f(statistics[2 * (w * kBeamRows + row)] - from);
      sum += sums[(w * kBeamRows + row) * kWidth + column] * factor;
      weights += statistics[2 * (w * kBeamRows + row) + 1] * factor;
    }
    if (column < c.value_width) put(c, whole, split, first_row + row, head, column, sum, weights);
    if (column == 0) put_statistics(c, whole, split, first_row + row, head, largest, weights);
  }
  sync_block();
}

// E: bf16 or f16; S: that or int8; kWidth: at least K and Kv, which are multiples of 8.
template <class E, class S, int kWidth>
__global__ void __launch_bounds__(kBeamWarps * 32, kWidth <= 64 ? 2 : 1) attend_beams(const AttendCall c) {
  OFAKERN_SHARED(BeamPlace, place, 1);
  if (warp() == 0) {
    const BeamPlace mine = beam_place(c);
    if (lane() == 0) place[0] = mine;
  }
  sync_block();
  const BeamPlace& p = place[0];
  if (p.split > 0 && p.split >= splits_of(c, p.sample.count)) return;
  for (int row = p.sample.begin + p.part * kBeamRows; row < p.sample.end; row += c.row_parts * kBeamRows) {
    unsigned q[kWidth / 16][4];
    load_queries<E, kWidth>(c, row, p.sample.end - row, p.head, q);
    BeamState<kWidth> state;
    pass_keys<E, S, kWidth>(BeamKeys<S>(c, p), q, state);
    merge_warps<kWidth>(c, state, splits_of(c, p.sample.count) <= 1, p.split, row, min(p.sample.end - row, kBeamRows),
                        p.head);
  }
}

}  // namespace
}  // namespace ofakern

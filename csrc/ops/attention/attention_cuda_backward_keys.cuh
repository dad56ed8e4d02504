// Backward for keys: four warps own a block of keys of one key head; the queries that see some of them pass by in
// tiles, for each query head of the group. Tiles are transposed (keys x queries), so that P and ds become operands of
// the products for dv and dk where they stand.
#pragma once

#include "ops/attention/attention_cuda_backward_queries.cuh"

namespace ofakern {
namespace {

struct KeyGradients {
  void *dk, *dv, *dk_pos;
  const float* delta;  // [Nq, H], from the queries' kernel
};

// The blocks of kStream queries that meet a block of keys, head after head.
struct QueryRun {
  const QueryBlock* blocks;
  int first, last, key_begin, key_end;  // slots that may meet the keys
  int head, heads_end;
  int base;  // the first of the 32 slots that `waiting` is of
  unsigned waiting;

  struct Step {
    int slot, head;  // slot < 0: no more
  };

  __device__ __forceinline__ void start(const QueryBlock* of_call, const KeyBlock& keys, int first_head, int group) {
    blocks = of_call, first = keys.first, last = keys.last, key_begin = keys.begin, key_end = keys.end;
    head = first_head, heads_end = first >= last ? first_head : first_head + group;
    base = first - 32, waiting = 0;
  }
  // All lanes of a warp.
  __device__ __forceinline__ Step take() {
    while (waiting == 0) {
      if (head >= heads_end) return {-1, 0};
      base += 32;
      if (base >= last) {
        ++head, base = first - 32;
        continue;
      }
      const int slot = base + simt::lane();
      waiting = simt::ballot(slot < last && blocks[slot].lo < key_end && blocks[slot].hi > key_begin);
    }
    const Step step{base + __ffs(static_cast<int>(waiting)) - 1, head};
    waiting &= waiting - 1;
    return step;
  }
};

// Queries, incoming gradients and what belongs to them on their way through shared memory.
template <class T>
struct QueryStream {
  T *q, *dout;
  float* stage;          // of each term 2 buffers of kWindow table entries
  int2 *visible, *same;  // 2 buffers of kStream each; of each term
  int* coords;           // of each term
  float *lse, *delta;
  QueryBlock* plans;  // of the last four tiles
  int q_pitch, dout_pitch;

  __host__ __device__ void carve(Carver& carver, const Call& call) {
    const int terms = terms_of(call);
    q_pitch = pitch_of(depth_of(call)), dout_pitch = pitch_of(padded(call.v.width));
    q = carver.take<T>(2 * kStream * q_pitch);
    dout = carver.take<T>(2 * kStream * dout_pitch);
    visible = carver.take<int2>(2 * kStream);
    lse = carver.take<float>(2 * kStream), delta = carver.take<float>(2 * kStream);
    plans = carver.take<QueryBlock>(4);
    stage = carver.take<float>(terms * 2 * kWindow);
    same = carver.take<int2>(terms * 2 * kStream), coords = carver.take<int>(terms * 2 * kStream);
  }

  __device__ __forceinline__ T* queries(int buffer) const { return q + buffer * kStream * q_pitch; }
  __device__ __forceinline__ T* incoming(int buffer) const { return dout + buffer * kStream * dout_pitch; }
  __device__ __forceinline__ float* entries(int t, int buffer) const { return stage + (2 * t + buffer) * kWindow; }
  __device__ __forceinline__ int2* runs(int t, int buffer) const { return same + (2 * t + buffer) * kStream; }
  __device__ __forceinline__ int* coordinates(int t, int buffer) const { return coords + (2 * t + buffer) * kStream; }

  __device__ __forceinline__ void issue_plan(const QueryBlock* blocks, const QueryRun::Step& step, int number) const {
    constexpr int kChunks = sizeof(QueryBlock) / 16;
    const int n = static_cast<int>(threadIdx.x);
    if (step.slot >= 0 && n < kChunks)
      simt::copy_async_16(reinterpret_cast<std::byte*>(plans + number % 4) + 16 * n,
                          reinterpret_cast<const std::byte*>(blocks + step.slot) + 16 * n, true);
  }

  // Starts the copies of a tile whose plan is there, and says how it meets the terms.
  __device__ __forceinline__ void issue(const Call& call, const Incoming& from, const float* of_delta,
                                        const KeyBlock& keys, const int (&least)[2], const int (&most)[2], int head,
                                        int number, TermTiles& terms) const {
    const QueryBlock& block = plans[number % 4];
    const int buffer = number % 2, begin = block.begin;
    const unsigned seeing = block.seeing;
    const auto token = [&](int r) { return (seeing >> r & 1u) != 0 ? begin + r : -1; };
    copy_rows(queries(buffer), q_pitch, call.q, head, kStream, token);
    copy_rows(queries(buffer) + padded(call.q.width), q_pitch, call.q_pos, head, kStream, token);
    copy_rows(incoming(buffer), dout_pitch, from.dout, head, kStream, token);
    const int r = simt::lane(), at = buffer * kStream + r, i = max(token(r), 0);
    const bool there = token(r) >= 0;
    if (simt::warp() == 0) simt::copy_async_8(visible + at, call.visible + i, there);
    if (simt::warp() == 1) {
      simt::copy_async_4(lse + at, from.lse + std::int64_t{i} * call.heads + head, there);
      simt::copy_async_4(delta + at, of_delta + std::int64_t{i} * call.heads + head, there);
    }
    const bool complete = keys.end - keys.begin == kWarps * 16 && block.end - block.begin == kStream;
#pragma unroll
    for (int t = 0; t < 2; ++t)
      terms.of[t] =
          meet_term(block.terms[t], call.terms[t], keys.begin, keys.end, least[t], most[t], complete, kWindow);
#pragma unroll 1
    for (int t = 0; t < terms_of(call); ++t) {
      const TermTile term = terms.at(t);
      if (!term.meets) continue;
      if (simt::warp() == 2 + t) {
        simt::copy_async_8(runs(t, buffer) + r, call.terms[t].same + i, there);
        simt::copy_async_4(coordinates(t, buffer) + r, call.terms[t].q_coord + i, there);
      }
      stage_term(entries(t, buffer), term, call.terms[t], head);
    }
  }

  __device__ __forceinline__ void arrive(const Call& call, int number, const TermTiles& terms) const {
    simt::copy_async_wait<0>();
#pragma unroll 1
    for (int t = 0; t < terms_of(call); ++t) rescale_stage(entries(t, number % 2), terms.at(t));
    simt::sync_block();
  }
};

// Adds a term's entries to a tile of keys x queries; the streamed queries' data are those of the tile's buffer.
__device__ __forceinline__ void add_term_of_keys(Tile<1>& score, const TermTile& tile, const float* stage,
                                                 const float* table, const int2* visible, const int2* same,
                                                 const int* coords, const int (&key)[2], const int (&key_coord)[2]) {
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = column_of(n) + c, coord = coords[column];
      if (tile.whole && tile.span > 0) {
        const float* const entries = stage + (coord - tile.base);
#pragma unroll
        for (int half = 0; half < 2; ++half) score[0][n][2 * half + c] += entries[-key_coord[half]];
      } else {
        const int2 sees = visible[column], run = same[column];
        const int lo = max(sees.x, run.x), length = max(min(sees.y, run.y) - lo, 0);
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (inside(key[half], lo, length))
            score[0][n][2 * half + c] += entry(stage, table, tile, minus(coord, key_coord[half]));
      }
    }
  }
}

// A bit for each of the lane's elements of 16 keys x kStream queries, at 4 n + e. key: the warp's first one, inside the
// sample of the queries; row: the tile's first query there. Four keys share a call's words, which four lanes hold: each
// of them makes one of the four calls that they need. Keys of another sample may start anywhere.
__device__ __forceinline__ unsigned kept_of_columns(std::uint64_t seed, unsigned threshold, int row, int key, int head,
                                                    int sample) {
  const int lane = simt::lane(), g = lane / 4, t = lane % 4;
  unsigned kept = 0;
  if (key % 4 != 0) {
#pragma unroll 1
    for (int e = 0; e < 4 * kColumns; ++e) {
      const unsigned at = static_cast<unsigned>(key + g + e % 4 / 2 * 8);
      const Words words = philox(at >> 2, row + column_of(e / 4) + e % 2, head, sample, seed);
      unsigned word = words.w[0];
#pragma unroll
      for (unsigned w = 1; w < 4; ++w) word = (at & 3u) == w ? words.w[w] : word;
      kept |= (word >= threshold ? 1u : 0u) << e;
    }
    return kept;
  }
  const int call = g % 4;  // this lane's: query column call % 2 of its pair, keys of half call / 2
  unsigned mine = 0;
#pragma unroll 1
  for (int n = 0; n < kColumns; ++n) {
    const Words words = philox(static_cast<unsigned>(key + g / 4 * 4 + call / 2 * 8) >> 2,
                               row + column_of(n) + call % 2, head, sample, seed);
#pragma unroll
    for (int w = 0; w < 4; ++w) mine |= (words.w[w] >= threshold ? 1u : 0u) << (4 * n + w);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const unsigned of_call = simt::shuffle(mine, (g / 4 * 4 + e) * 4 + t);
    kept |= (of_call >> g % 4 & 0x1111u) << e;
  }
  return kept;
}

__device__ __forceinline__ KeyTile no_keys() { return {0, 0, {INT_MAX, INT_MAX}, {INT_MIN, INT_MIN}, {}}; }

template <class T>
struct KeysMemory {
  static constexpr int kRows = kWarps * 16;
  T *k, *v;  // later dk and dv
  int k_pitch, v_pitch;
  QueryStream<T> stream;

  __host__ __device__ std::size_t carve(std::byte* base, const Call& call) {
    Carver carver{base};
    k_pitch = pitch_of(depth_of(call)), v_pitch = pitch_of(padded(call.v.width));
    k = carver.take<T>(kRows * k_pitch);
    v = carver.take<T>(kRows * v_pitch);
    stream.carve(carver, call);
    return carver.used;
  }
};

// The lane's two keys. A key past the block's end has number -1, which nobody sees.
struct LaneKeys {
  int key[2];
  int coord[2][2];  // of each term

  __device__ __forceinline__ void load(const Call& call, const KeyBlock& block, int first_row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = block.begin + first_row + row_in_warp(0, half);
      key[half] = j < block.end ? j : -1;
#pragma unroll
      for (int t = 0; t < 2; ++t)
        coord[t][half] = call.terms[t].table != nullptr && j < block.end ? call.terms[t].k_coord[j] : 0;
    }
  }
};

// score becomes P * M * c, the operand of dv, and dprob becomes ds.
__device__ __forceinline__ void differentiate_keys(Tile<1>& score, Tile<1>& dprob, const LaneKeys& keys,
                                                   const int2* visible, const float* lse, const float* delta,
                                                   bool whole, unsigned kept, float factor) {
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = column_of(n) + c;
      const int2 sees = visible[column];
      const float row_lse = lse[column] == -INFINITY ? INFINITY : lse[column] * kLog2e, row_delta = delta[column];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int e = 2 * half + c;
        const bool seen = whole || inside(keys.key[half], sees.x, sees.y - sees.x);
        const float prob = seen ? power_of_2(score[0][n][e] - row_lse) : 0.0f;
        const bool stays = (kept >> (4 * n + e) & 1u) != 0;
        const float dp = stays ? dprob[0][n][e] * factor : 0.0f;
        score[0][n][e] = stays ? prob * factor : 0.0f;
        dprob[0][n][e] = prob * (dp - row_delta);
      }
    }
  }
}

template <class T, int kDepth, int kValue>
__global__ void __launch_bounds__(kThreads, 2)
    attention_backward_keys(const Call call, const Incoming incoming, const KeyGradients gradients,
                            const QueryBlock* __restrict__ blocks, const KeyBlock* __restrict__ key_blocks) {
  const KeyBlock own = key_blocks[blockIdx.x];
  if (own.begin >= own.end) return;
  const int key_head = static_cast<int>(blockIdx.y), first_row = simt::warp() * 16;
  const int depth = depth_of(call), value = padded(call.v.width);
  KeysMemory<T> memory;
  memory.carve(simt::dynamic_shared(), call);
  const QueryStream<T>& stream = memory.stream;
  T *const k = memory.k + first_row * memory.k_pitch, *const v = memory.v + first_row * memory.v_pitch;
  const KeyTile* const tiles = call.key_tiles + own.tile;
  const KeyTile low = tiles[0], high = own.end - own.begin > kStream ? tiles[1] : no_keys();
  const int least[2] = {min(low.least[0], high.least[0]), min(low.least[1], high.least[1])};
  const int most[2] = {max(low.most[0], high.most[0]), max(low.most[1], high.most[1])};
  const auto token = [&](int r) {
    return ((r < kStream ? low.seen : high.seen) >> r % kStream & 1u) != 0 ? own.begin + r : -1;
  };
  copy_rows(memory.k, memory.k_pitch, call.k, key_head, memory.kRows, token);
  copy_rows(memory.k + padded(call.k.width), memory.k_pitch, call.k_pos, key_head, memory.kRows, token);
  copy_rows(memory.v, memory.v_pitch, call.v, key_head, memory.kRows, token);
  LaneKeys keys;
  keys.load(call, own, first_row);

  QueryRun run;
  run.start(blocks, own, key_head * call.group, call.group);
  QueryRun::Step now{-1, 0}, next = run.take();
  stream.issue_plan(blocks, next, 0);
  simt::copy_async_commit();
  simt::copy_async_wait<0>();
  simt::sync_block();
  const std::uint64_t seed = call.dropout ? dropout_key(call.seed) : 0;
  float dk[1][kDepth / 8][4], dv[1][kValue / 8][4];
  clear(dk), clear(dv);
  TermTiles ahead{};
  for (int number = -1; now.slot >= 0 || next.slot >= 0; ++number) {  // reads tile `number`, the next is on its way
    const TermTiles terms = ahead;
    const QueryRun::Step after = run.take();
    if (number >= 0) stream.arrive(call, number, terms);
    if (next.slot >= 0) stream.issue(call, incoming, gradients.delta, own, least, most, next.head, number + 1, ahead);
    stream.issue_plan(blocks, after, number + 2);
    simt::copy_async_commit();
    const int buffer = number % 2, head = now.head;
    now = next, next = after;
    if (number < 0) continue;

    const QueryBlock& block = stream.plans[number % 4];
    const T *const q = stream.queries(buffer), *const dout = stream.incoming(buffer);
    const int2* const visible = stream.visible + buffer * kStream;
    Tile<1> score, dprob;
    dot_products<T, 1>(score, k, memory.k_pitch, q, stream.q_pitch, depth);
    scale_tile<1>(score, call.score_scale);
#pragma unroll 1
    for (int t = 0; t < terms_of(call); ++t) {
      const TermTile term = terms.at(t);
      const int coord[2] = {t == 0 ? keys.coord[0][0] : keys.coord[1][0], t == 0 ? keys.coord[0][1] : keys.coord[1][1]};
      if (term.meets)
        add_term_of_keys(score, term, stream.entries(t, buffer),
                         call.terms[t].table + std::int64_t{head} * call.terms[t].rows, visible, stream.runs(t, buffer),
                         stream.coordinates(t, buffer), keys.key, coord);
    }
    dot_products<T, 1>(dprob, v, memory.v_pitch, dout, stream.dout_pitch, value);
    unsigned kept = ~0u;
    if (call.dropout)
      kept = kept_of_columns(seed, call.threshold, block.begin - call.q_offsets[block.sample],
                             own.begin + first_row - call.k_offsets[block.sample], head, block.sample);
    const bool whole = own.end - own.begin == memory.kRows && block.end - block.begin == kStream &&
                       own.begin >= block.full_lo && own.end <= block.full_hi;
    differentiate_keys(score, dprob, keys, visible, stream.lse + buffer * kStream, stream.delta + buffer * kStream,
                       whole, kept, call.keep_scale * (call.head_scale != nullptr ? call.head_scale[head] : 1.0f));
    add_products<T, 1, kValue>(dv, score, dout, stream.dout_pitch, value);
    add_products<T, 1, kDepth>(dk, dprob, q, stream.q_pitch, depth);
  }
  simt::copy_async_wait<0>();
  simt::sync_block();
  const float scale[1][2] = {{call.scale, call.scale}}, one[1][2] = {{1.0f, 1.0f}};
  const int count = min(16, own.end - own.begin - first_row), first = own.begin + first_row;
  const int key_heads = call.heads / call.group;
  put_rows<T, 1, kDepth>(k, memory.k_pitch, dk, depth, scale);
  put_rows<T, 1, kValue>(v, memory.v_pitch, dv, value, one);
  simt::sync_warp();
  store_rows(static_cast<T*>(gradients.dk), k, memory.k_pitch, call.k.width, key_heads, key_head, first, count);
  store_rows(static_cast<T*>(gradients.dk_pos), k + padded(call.k.width), memory.k_pitch, call.k_pos.width, key_heads,
             key_head, first, count);
  store_rows(static_cast<T*>(gradients.dv), v, memory.v_pitch, call.v.width, key_heads, key_head, first, count);
}

}  // namespace
}  // namespace ofakern

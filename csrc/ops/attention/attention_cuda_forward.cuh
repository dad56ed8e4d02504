// Forward: four warps own a block of queries of one head; keys pass by in tiles (online softmax, base 2).
#pragma once

#include "ops/attention/attention_cuda_tiles.cuh"

namespace ofakern {
namespace {

// Keys and values on their way through shared memory: two buffers, one being filled while the other is read.
template <class T>
struct KeyStream {
  T *k, *v;
  float* stage;  // of each term 2 buffers of `window` table entries
  int* coords;   // of each term 2 buffers of kStream coordinates
  int k_pitch, v_pitch, window;

  __host__ __device__ void carve(Carver& carver, const Call& call, int of_window) {
    k_pitch = pitch_of(depth_of(call)), v_pitch = pitch_of(padded(call.v.width)), window = of_window;
    k = carver.take<T>(2 * kStream * k_pitch);
    v = carver.take<T>(2 * kStream * v_pitch);
    stage = carver.take<float>(terms_of(call) * 2 * window);
    coords = carver.take<int>(terms_of(call) * 2 * kStream);
  }

  __device__ __forceinline__ T* keys(int buffer) const { return k + buffer * kStream * k_pitch; }
  __device__ __forceinline__ T* values(int buffer) const { return v + buffer * kStream * v_pitch; }
  __device__ __forceinline__ float* entries(int t, int buffer) const { return stage + (2 * t + buffer) * window; }
  __device__ __forceinline__ int* coordinates(int t, int buffer) const { return coords + (2 * t + buffer) * kStream; }

  // Starts the copies of the run's tile n, and says how it meets the terms.
  __device__ __forceinline__ KeyTile issue(const Call& call, const QueryBlock& block, const KeyRun& run, int n,
                                           int head, TermTiles& terms) const {
    const KeyTile tile = run.tile(call, n);
    const int first = run.first(n), key_head = head / call.group, buffer = n % 2;
    const auto token = [&](int r) { return (tile.seen >> r & 1u) != 0 ? first + r : -1; };
    copy_rows(keys(buffer), k_pitch, call.k, key_head, kStream, token);
    copy_rows(keys(buffer) + padded(call.k.width), k_pitch, call.k_pos, key_head, kStream, token);
    copy_rows(values(buffer), v_pitch, call.v, key_head, kStream, token);
#pragma unroll
    for (int t = 0; t < 2; ++t)
      terms.of[t] =
          meet_term(block.terms[t], call.terms[t], first, first + kStream, tile.least[t], tile.most[t], true, window);
#pragma unroll 1
    for (int t = 0; t < terms_of(call); ++t) {
      const TermTile term = terms.at(t);
      if (!term.meets) continue;
      const int r = static_cast<int>(threadIdx.x);
      if (r < kStream) {
        const int key = token(r);
        simt::copy_async_4(coordinates(t, buffer) + r, call.terms[t].k_coord + max(key, 0), key >= 0);
      }
      stage_term(entries(t, buffer), term, call.terms[t], head);
    }
    simt::copy_async_commit();
    return tile;
  }

  // Waits until tile n is there for the whole block; the other buffer is then free.
  __device__ __forceinline__ void arrive(const Call& call, int n, const TermTiles& terms) const {
    simt::copy_async_wait<0>();
#pragma unroll 1
    for (int t = 0; t < terms_of(call); ++t) rescale_stage(entries(t, n % 2), terms.at(t));
    simt::sync_block();
  }
};

// Queries and their positions side by side; rows that see no key are zeros.
template <class T>
__device__ __forceinline__ void copy_queries(T* to, int pitch, const Call& call, const QueryBlock& block,
                                             const QueryRows& rows, int head, int count) {
  const auto token = [&](int r) { return block.begin + r < block.end && rows.length(r) > 0 ? block.begin + r : -1; };
  copy_rows(to, pitch, call.q, head, count, token);
  copy_rows(to + padded(call.q.width), pitch, call.q_pos, head, count, token);
}

// Scores in base 2 of a warp's queries and the run's tile n; -infinity where they do not see each other.
template <class T, int kM>
__device__ __forceinline__ void score_tile(Tile<kM>& score, const Call& call, const QueryBlock& block,
                                           const QueryRows& rows, const T* q, int q_pitch, const KeyStream<T>& stream,
                                           const KeyRun& run, int n, const TermTiles& terms, int head, int first_row) {
  const int first = run.first(n), buffer = n % 2;
  dot_products<T, kM>(score, q, q_pitch, stream.keys(buffer), stream.k_pitch, depth_of(call));
  scale_tile<kM>(score, call.score_scale);
#pragma unroll 1
  for (int t = 0; t < terms_of(call); ++t) {
    const TermTile term = terms.at(t);
    if (term.meets)
      add_term<kM>(score, term, stream.entries(t, buffer),
                   call.terms[t].table + std::int64_t{head} * call.terms[t].rows, stream.coordinates(t, buffer), rows,
                   t, first_row, first);
  }
  if (first < block.full_lo || first + kStream > block.full_hi) hide<kM>(score, rows, first_row, first);
}

template <class T, int kM, int kValue>
struct ForwardMemory {
  static constexpr int kRows = kWarps * kM * 16;
  T* q;  // later the block's results
  int q_pitch;
  KeyStream<T> stream;
  QueryRows rows;

  __host__ __device__ std::size_t carve(std::byte* base, const Call& call) {
    Carver carver{base};
    const int depth = depth_of(call), value = padded(call.v.width);
    q_pitch = pitch_of(depth > value ? depth : value);
    q = carver.take<T>(kRows * q_pitch);
    stream.carve(carver, call, 128 + 2 * kRows);
    rows.carve(carver, call, kRows);
    return carver.used;
  }
};

// The rows' running maxima, their lanes' sums of exponentials, and sums of weighted values.
template <int kM, int kValue>
struct Softmax {
  float top[kM][2], total[kM][2];
  float sums[kM][kValue / 8][4];

  __device__ __forceinline__ void start() {
    clear(total), clear(sums);
#pragma unroll
    for (int m = 0; m < kM; ++m) top[m][0] = top[m][1] = -INFINITY;
  }

  // score becomes its exponentials; what was summed before follows the new maximum.
  __device__ __forceinline__ void step(Tile<kM>& score) {
    float shrink[kM][2];
    bool moved = false;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = top[m][half];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) most = fmaxf(most, fmaxf(score[m][n][2 * half], score[m][n][2 * half + 1]));
        most = fmaxf(most, simt::shuffle_xor(most, 1));
        most = fmaxf(most, simt::shuffle_xor(most, 2));
        const float base = most == -INFINITY ? 0.0f : most;  // a row that has seen no key yet
        shrink[m][half] = power_of_2(top[m][half] - base);
        moved = moved || most != top[m][half];
        top[m][half] = most;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = score[m][n][2 * half + c];
            x = power_of_2(x - base);
            sum += x;
          }
        total[m][half] = total[m][half] * shrink[m][half] + sum;
      }
    if (!simt::any(moved)) return;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kValue / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] *= shrink[m][e / 2];
  }
};

template <class T, int kM, int kValue>
__global__ void __launch_bounds__(kThreads, 2)
    attention_forward_tiles(const Call call, const QueryBlock* __restrict__ blocks, T* __restrict__ out,
                            float* __restrict__ lse) {
  // Under causal masks later queries see more keys: the longest work starts first.
  const QueryBlock block = blocks[gridDim.x - 1 - blockIdx.x];
  if (block.begin >= block.end) return;
  const int head = static_cast<int>(blockIdx.y), first_row = simt::warp() * kM * 16;
  ForwardMemory<T, kM, kValue> memory;
  memory.carve(simt::dynamic_shared(), call);
  const KeyStream<T>& stream = memory.stream;
  T* const q = memory.q + first_row * memory.q_pitch;
  memory.rows.load(call, block);
  simt::sync_block();

  const KeyRun run(call, block);
  copy_queries(memory.q, memory.q_pitch, call, block, memory.rows, head, memory.kRows);
  const std::uint64_t seed = call.dropout ? dropout_key(call.seed) : 0;
  const int row_local = block.begin - call.q_offsets[block.sample] + first_row;
  Softmax<kM, kValue> softmax;
  softmax.start();
  TermTiles ahead{};
  for (int n = -1; n < run.count; ++n) {  // reads tile n while tile n + 1 is on its way
    const TermTiles terms = ahead;
    if (n >= 0) stream.arrive(call, n, terms);
    if (n + 1 < run.count) stream.issue(call, block, run, n + 1, head, ahead);
    if (n < 0) continue;
    Tile<kM> score;
    score_tile<T, kM>(score, call, block, memory.rows, q, memory.q_pitch, stream, run, n, terms, head, first_row);
    softmax.step(score);
    if (call.dropout) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const unsigned kept =
            kept_of_rows(seed, call.threshold, row_local + m * 16, run.first(n) - run.origin, head, block.sample);
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if ((kept >> (4 * c + e) & 1u) == 0) score[m][c][e] = 0.0f;
      }
    }
    add_products<T, kM, kValue>(softmax.sums, score, stream.values(n % 2), stream.v_pitch, padded(call.v.width));
  }
  simt::copy_async_wait<0>();  // of the queries, where there was no tile
  simt::sync_block();

  const float after =
      (call.dropout ? call.keep_scale : 1.0f) * (call.head_scale != nullptr ? call.head_scale[head] : 1.0f);
  float factor[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = softmax.total[m][half];
      total += simt::shuffle_xor(total, 1);
      total += simt::shuffle_xor(total, 2);
      factor[m][half] = total > 0.0f ? after / total : 0.0f;
      const int i = block.begin + first_row + row_in_warp(m, half);
      if (simt::lane() % 4 == 0 && i < block.end)
        lse[std::int64_t{i} * call.heads + head] =
            total > 0.0f ? (softmax.top[m][half] + log2f(total)) * kLn2 : -INFINITY;
    }
  put_rows<T, kM, kValue>(q, memory.q_pitch, softmax.sums, padded(call.v.width), factor);
  simt::sync_warp();
  store_rows(out, q, memory.q_pitch, call.v.width, call.heads, head, block.begin + first_row,
             min(kM * 16, block.end - block.begin - first_row));
}

}  // namespace
}  // namespace ofakern

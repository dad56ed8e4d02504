// Backward for queries: dq, dq_pos, D = rowsum(dout * out) - dlse, and the block's part of the gradients of tables and
// head scale. The forward's shape, with P = 2^(score - lse) and ds = P * (M c dP - D) in place of the running softmax.
#pragma once

#include "ops/attention/attention_cuda_forward.cuh"
#include "ops/attention/attention_cuda_tables.cuh"

namespace ofakern {
namespace {

struct Incoming {
  Operand dout;
  const void* out;  // contiguous, as are lse and dlse
  const float *lse, *dlse;
};

// A part is a run of query blocks whose sums one block of threads makes.
struct QueryGradients {
  void *dq, *dq_pos;
  float* delta;           // [Nq, H]: D
  float* table_parts[2];  // [parts, H, R]
  float* scale_parts;     // [parts, H]
  int blocks, blocks_per_part;
};

template <class T>
struct QueriesMemory {
  static constexpr int kRows = kWarps * 16;
  T *q, *dout;  // q later holds dq
  int q_pitch, dout_pitch;
  KeyStream<T> stream;
  QueryRows rows;
  float *lse, *delta;  // of the rows; lse in base 2, +infinity for a row that sees nothing
  float* dscore;       // [kWarps, kScores]
  float* sums;         // [terms, kWarps, kWindow]
  float* of_warps;

  __host__ __device__ std::size_t carve(std::byte* base, const Call& call) {
    Carver carver{base};
    q_pitch = pitch_of(depth_of(call)), dout_pitch = pitch_of(padded(call.v.width));
    q = carver.take<T>(kRows * q_pitch);
    dout = carver.take<T>(kRows * dout_pitch);
    stream.carve(carver, call, kWindow);
    rows.carve(carver, call, kRows);
    lse = carver.take<float>(kRows), delta = carver.take<float>(kRows);
    dscore = carver.take<float>(terms_of(call) > 0 ? kWarps * kScores : 0);
    sums = carver.take<float>(terms_of(call) * kWarps * kWindow);
    of_warps = carver.take<float>(kWarps);
    return carver.used;
  }
};

// D of the block's rows, two threads for each, once dout is in shared memory; lse in base 2.
template <class T>
__device__ __forceinline__ void load_statistics(const QueriesMemory<T>& memory, const Call& call,
                                                const Incoming& incoming, const QueryBlock& block, int head,
                                                float* delta_out) {
  const int r = static_cast<int>(threadIdx.x) / 2, part = static_cast<int>(threadIdx.x) % 2, width = call.v.width;
  const bool there = block.begin + r < block.end, sees = there && memory.rows.length(r) > 0;
  const std::int64_t statistic = (std::int64_t{block.begin} + r) * call.heads + head;
  float sum = 0.0f;
  if (sees) {
    const T* const out = static_cast<const T*>(incoming.out) + statistic * width;
    const T* const dout = memory.dout + r * memory.dout_pitch;
    for (int c = part * 8; c < width; c += 16) {
      alignas(16) T a[8], b[8];
      *reinterpret_cast<uint4*>(a) = *reinterpret_cast<const uint4*>(out + c);
      *reinterpret_cast<uint4*>(b) = *reinterpret_cast<const uint4*>(dout + c);
#pragma unroll
      for (int n = 0; n < 8; ++n) sum = fmaf(simt::to_float(a[n]), simt::to_float(b[n]), sum);
    }
  }
  sum += simt::shuffle_xor(sum, 1);
  if (part != 0) return;
  if (sees && incoming.dlse != nullptr) sum -= incoming.dlse[statistic];
  const float lse = sees ? incoming.lse[statistic] : -INFINITY;
  memory.delta[r] = sum;
  memory.lse[r] = lse == -INFINITY ? INFINITY : lse * kLog2e;
  if (there) delta_out[statistic] = sum;
}

// What a block of threads adds up over its run of query blocks.
struct PartSums {
  int base[2];  // of each term's window
  float scale;  // this lane's
};

template <class T>
__device__ __forceinline__ TableSums table_sums(const QueriesMemory<T>& memory, const Call& call,
                                                const QueryGradients& gradients, const PartSums& part, int head,
                                                int t) {
  const int rows = call.terms[t].rows;
  return {memory.sums + t * kWarps * kWindow,
          gradients.table_parts[t] + (std::int64_t{blockIdx.x} * call.heads + head) * rows, rows,
          t == 0 ? part.base[0] : part.base[1]};
}

// score becomes ds = P * (M c dP - D), in f32; scale_sum += P * M * dP.
__device__ __forceinline__ void differentiate_scores(Tile<1>& score, const Tile<1>& dprob, const Call& call,
                                                     const float* lse, const float* delta, int first_row, unsigned kept,
                                                     float head_scale, float& scale_sum) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + row_in_warp(0, half);
    const float row_lse = lse[row], row_delta = delta[row];
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int e = 2 * half + c;
        const float prob = power_of_2(score[0][n][e] - row_lse);
        const float dp = (kept >> (4 * n + e) & 1u) != 0 ? dprob[0][n][e] * call.keep_scale : 0.0f;
        scale_sum = fmaf(prob, dp, scale_sum);
        score[0][n][e] = prob * (dp * head_scale - row_delta);
      }
  }
}

template <class T, int kDepth>
__device__ __forceinline__ void backward_of_block(const QueriesMemory<T>& memory, const Call& call,
                                                  const Incoming& incoming, const QueryGradients& gradients,
                                                  const QueryBlock& block, int head, PartSums& part) {
  const int first_row = simt::warp() * 16, depth = depth_of(call), value = padded(call.v.width);
  const KeyStream<T>& stream = memory.stream;
  T* const q = memory.q + first_row * memory.q_pitch;
  simt::sync_block();  // the block before is done
  memory.rows.load(call, block);
  simt::sync_block();
  copy_queries(memory.q, memory.q_pitch, call, block, memory.rows, head, memory.kRows);
  copy_rows(memory.dout, memory.dout_pitch, incoming.dout, head, memory.kRows,
            [&](int r) { return block.begin + r < block.end && memory.rows.length(r) > 0 ? block.begin + r : -1; });
  simt::copy_async_commit();
  simt::copy_async_wait<0>();
  simt::sync_block();
  load_statistics(memory, call, incoming, block, head, gradients.delta);

  const KeyRun run(call, block);
  const std::uint64_t seed = call.dropout ? dropout_key(call.seed) : 0;
  const int row_local = block.begin - call.q_offsets[block.sample] + first_row;
  const float head_scale = call.head_scale != nullptr ? call.head_scale[head] : 1.0f;
  float* const dscore = memory.dscore + simt::warp() * kScores;
  float dq[1][kDepth / 8][4];
  clear(dq);
  TermTiles ahead{};
  KeyTile keys_ahead{};
  for (int n = -1; n < run.count; ++n) {  // reads tile n while tile n + 1 is on its way
    const TermTiles terms = ahead;
    const KeyTile keys = keys_ahead;
    if (n >= 0) stream.arrive(call, n, terms);  // and D, at the first tile
    if (n + 1 < run.count) keys_ahead = stream.issue(call, block, run, n + 1, head, ahead);
    if (n < 0) continue;
    Tile<1> score, dprob;
    score_tile<T, 1>(score, call, block, memory.rows, q, memory.q_pitch, stream, run, n, terms, head, first_row);
    dot_products<T, 1>(dprob, memory.dout + first_row * memory.dout_pitch, memory.dout_pitch, stream.values(n % 2),
                       stream.v_pitch, value);
    const unsigned kept =
        call.dropout ? kept_of_rows(seed, call.threshold, row_local, run.first(n) - run.origin, head, block.sample)
                     : ~0u;
    differentiate_scores(score, dprob, call, memory.lse, memory.delta, first_row, kept, head_scale, part.scale);
    const bool meets = terms.of[0].meets || terms.of[1].meets;
    if (meets) put_scores(dscore, score);
    add_products<T, 1, kDepth>(dq, score, stream.keys(n % 2), stream.k_pitch, depth);
    if (!meets) continue;
#pragma unroll 1
    for (int t = 0; t < terms_of(call); ++t) {
      if (!terms.at(t).meets) continue;
      TableSums sums = table_sums(memory, call, gradients, part, head, t);
      sums.add(terms.at(t), dscore, keys,
               run.own ? call.order + t * call.order_of_term + std::int64_t{run.slot + n} * kStream : nullptr,
               stream.coordinates(t, n % 2), memory.rows, t, first_row, run.first(n));
      if (t == 0) part.base[0] = sums.base;
      if (t == 1) part.base[1] = sums.base;
    }
    simt::sync_warp();  // ds is read before the next tile's takes its place
  }
  const float factor[1][2] = {{call.scale, call.scale}};
  const int count = min(16, block.end - block.begin - first_row);
  put_rows<T, 1, kDepth>(q, memory.q_pitch, dq, depth, factor);
  simt::sync_warp();
  store_rows(static_cast<T*>(gradients.dq), q, memory.q_pitch, call.q.width, call.heads, head, block.begin + first_row,
             count);
  store_rows(static_cast<T*>(gradients.dq_pos), q + padded(call.q.width), memory.q_pitch, call.q_pos.width, call.heads,
             head, block.begin + first_row, count);
}

template <class T, int kDepth>
__global__ void __launch_bounds__(kThreads, 2)
    attention_backward_queries(const Call call, const Incoming incoming, const QueryGradients gradients,
                               const QueryBlock* __restrict__ blocks) {
  const int head = static_cast<int>(blockIdx.y), own = static_cast<int>(blockIdx.x);
  QueriesMemory<T> memory;
  memory.carve(simt::dynamic_shared(), call);
  PartSums part{{TableSums::kNowhere, TableSums::kNowhere}, 0.0f};
  for (int t = 0; t < terms_of(call); ++t)
    if (call.terms[t].table != nullptr) table_sums(memory, call, gradients, part, head, t).clear_all();
  const int last = min((own + 1) * gradients.blocks_per_part, gradients.blocks);
  for (int b = own * gradients.blocks_per_part; b < last; ++b) {
    const QueryBlock block = blocks[b];
    if (block.begin < block.end) backward_of_block<T, kDepth>(memory, call, incoming, gradients, block, head, part);
  }
  for (int t = 0; t < terms_of(call); ++t)
    if (call.terms[t].table != nullptr) table_sums(memory, call, gradients, part, head, t).flush();
  if (call.head_scale == nullptr) return;
  const float sum = simt::warp_sum(part.scale);
  if (simt::lane() == 0) memory.of_warps[simt::warp()] = sum;
  simt::sync_block();
  if (threadIdx.x == 0) {
    float all = 0.0f;
    for (int w = 0; w < kWarps; ++w) all += memory.of_warps[w];
    gradients.scale_parts[std::int64_t{own} * call.heads + head] = all;
  }
}

}  // namespace
}  // namespace ofakern

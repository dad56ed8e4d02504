// Gradients of the tables: sums of ds over the pairs with one difference of coordinates, without atomics.
//
// A warp adds its sixteen rows of ds one after the other into its own sums of a window of table rows in shared memory.
// Lanes take a row's 32 keys by rising coordinate (the work list's order): neighbours with one coordinate are added up
// among the lanes first, so that no two lanes write one sum. Where the tiles leave the window, the warps' sums are
// added in their order to the block's part of the table in global memory, which nobody else writes.
#pragma once

#include "ops/attention/attention_cuda_tiles.cuh"

namespace ofakern {
namespace {

constexpr int kWindow = 256;     // table rows of a warp's sums: 64 queries and 32 keys of a text or of an image
constexpr int kScorePitch = 40;  // of a warp's ds [16, kStream] in shared memory: rows on different banks
constexpr int kScores = 16 * kScorePitch;

// A warp's ds to shared memory.
__device__ __forceinline__ void put_scores(float* to, const Tile<1>& dscore) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
      *reinterpret_cast<float2*>(to + row_in_warp(0, half) * kScorePitch + column_of(n)) =
          make_float2(dscore[0][n][2 * half], dscore[0][n][2 * half + 1]);
  simt::sync_warp();
}

// The sums of one term, in a window of its table's rows.
struct TableSums {
  float* sums;  // [kWarps, kWindow] in shared memory
  float* part;  // the block's own sums of all table rows
  int rows;     // of the table
  int base;     // the window's first table row

  static constexpr int kNowhere = -2 * kWindow;  // the first window's base: it has no rows of the table

  __device__ __forceinline__ void clear_all() const {
    for (int n = static_cast<int>(threadIdx.x); n < kWarps * kWindow; n += kThreads) sums[n] = 0.0f;
    for (int n = static_cast<int>(threadIdx.x); n < rows; n += kThreads) part[n] = 0.0f;
  }

  // The whole block's: all warps' sums move to the part, and are 0 again.
  __device__ __forceinline__ void flush() const {
    simt::sync_block();
    for (int n = static_cast<int>(threadIdx.x); n < kWindow; n += kThreads) {
      const int row = base + n;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += sums[w * kWindow + n], sums[w * kWindow + n] = 0.0f;
      if (row >= 0 && row < rows) part[row] += sum;
    }
    simt::sync_block();
  }

  // Adds a tile's ds, which put_scores left in `dscore`. order: the tile's keys by rising coordinate, null when nobody
  // knows it; coords: of the tile's keys.
  __device__ __forceinline__ void add(const TermTile& tile, const float* dscore, const KeyTile& keys,
                                      const unsigned char* order, const int* coords, const QueryRows& rows_of, int t,
                                      int first_row, int first) {
    // Later keys mostly have larger coordinates and so smaller table rows: a new window leaves its room below.
    for (int top = tile.to; top > tile.from;) {
      const bool held = base <= tile.from && tile.to <= base + kWindow;
      if (!held) {
        flush();
        base = top - kWindow;
      }
      float* const own = sums + simt::warp() * kWindow;
      if (order != nullptr)
        add_rows(own, tile, dscore, keys, order, coords, rows_of, t, first_row, first);
      else
        add_one_by_one(own, dscore, coords, rows_of, t, first_row, first);
      top = held ? tile.from : base;
    }
  }

 private:
  __device__ __forceinline__ void add_rows(float* own, const TermTile& tile, const float* dscore, const KeyTile& keys,
                                           const unsigned char* order, const int* coords, const QueryRows& rows_of,
                                           int t, int first_row, int first) const {
    const int lane = simt::lane(), column = order[lane], coord = coords[column];
    const bool seen = (keys.seen >> column & 1u) != 0, repeats = (keys.repeats >> t & 1u) != 0;
    unsigned same = 0;  // bit n: the lane 2^n further on has this lane's coordinate
    bool leads = true;  // the first lane of its coordinate
    if (repeats) {
      const int mine = seen ? 1 : 0;
#pragma unroll
      for (int n = 0; n < 5; ++n) {
        const bool there = lane + (1 << n) < 32;
        const int other = simt::shuffle_down(coord, 1 << n), other_seen = simt::shuffle_down(mine, 1 << n);
        if (there && seen && other_seen != 0 && other == coord) same |= 1u << n;
      }
      const int before = simt::shuffle_up(coord, 1);
      leads = lane == 0 || before != coord;
    }
#pragma unroll 4
    for (int r = 0; r < 16; ++r) {
      const int row = first_row + r;
      const bool active =
          seen && (tile.whole || inside(first + column, rows_of.active_lo(t, row), rows_of.active_length(t, row)));
      float value = active ? dscore[r * kScorePitch + column] : 0.0f;
      if (repeats) {
#pragma unroll
        for (int n = 0; n < 5; ++n) {
          const float other = simt::shuffle_down(value, 1 << n);
          if ((same >> n & 1u) != 0) value += other;
        }
      }
      const unsigned at = static_cast<unsigned>(minus(minus(rows_of.coord(t, row), coord), base));
      if ((repeats ? seen && leads : active) && at < kWindow) own[at] += value;
      simt::sync_warp();
    }
  }

  // Queries that see other samples' keys: rare, and slow.
  __device__ __forceinline__ void add_one_by_one(float* own, const float* dscore, const int* coords,
                                                 const QueryRows& rows_of, int t, int first_row, int first) const {
    if (simt::lane() == 0) {
#pragma unroll 1
      for (int r = 0; r < 16; ++r)
#pragma unroll 1
        for (int column = 0; column < kStream; ++column) {
          const int row = first_row + r;
          const unsigned at = static_cast<unsigned>(minus(minus(rows_of.coord(t, row), coords[column]), base));
          if (at < kWindow && inside(first + column, rows_of.active_lo(t, row), rows_of.active_length(t, row)))
            own[at] += dscore[r * kScorePitch + column];
        }
    }
    simt::sync_warp();
  }
};

// out [elements] = sum over parts, one after the other.
__global__ void __launch_bounds__(kThreads)
    attention_sum_parts(const float* __restrict__ parts, int count, std::int64_t elements, float* __restrict__ out) {
  const std::int64_t n = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= elements) return;
  float sum = 0.0f;
  for (int p = 0; p < count; ++p) sum += parts[p * elements + n];
  out[n] = sum;
}

}  // namespace
}  // namespace ofakern

// A tile's rows after their product: positions, LayerNorm, and LayerNorm's gradient, in place.
#pragma once

#include "ops/patch_embed/patch_embed_product.cuh"

namespace ofakern {
namespace {

constexpr int kWarps = kTokens / 32;
constexpr int kWidest = 2048;              // a warp holds a row in registers
constexpr int kHeld = kWidest / (32 * 8);  // eights of a lane

template <class T>
struct Embedding {
  const T* position;                 // [places, width], or null
  const std::int32_t* index;         // of every token, or null
  const float *ln_weight, *ln_bias;  // null without LayerNorm
  int places;
  float eps;
};

// A token's row of the table: null where there is no table; `lost` where the index is none.
template <class T>
struct Place {
  const T* row;
  bool lost;
};

template <class T>
__device__ __forceinline__ Place<T> place_of(const Embedding<T>& e, const Tile& tile, int row, int width) {
  if (e.position == nullptr) return {nullptr, false};
  const int token = tile.first + row;
  const int place = e.index != nullptr ? e.index[tile.set->first_token + token] : token % tile.set->per_image;
  if (place < 0 || place >= e.places) return {nullptr, true};
  return {e.position + static_cast<i64>(place) * width, false};
}

template <class T>
__device__ __forceinline__ void load_eight(const T* from, float (&to)[8]) {
  if constexpr (std::is_same_v<T, float>) {
    const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
  } else {
    const uint4 all = *reinterpret_cast<const uint4*>(from);
    const T* const each = reinterpret_cast<const T*>(&all);
#pragma unroll
    for (int n = 0; n < 8; ++n) to[n] = simt::to_float(each[n]);
  }
}

template <class T>
__device__ __forceinline__ void store_eight(const float (&from)[8], T* to) {
  if constexpr (std::is_same_v<T, float>) {
    reinterpret_cast<float4*>(to)[0] = {from[0], from[1], from[2], from[3]};
    reinterpret_cast<float4*>(to)[1] = {from[4], from[5], from[6], from[7]};
  } else {
    *reinterpret_cast<uint4*>(to) = {pack<T>(from[0], from[1]), pack<T>(from[2], from[3]), pack<T>(from[4], from[5]),
                                     pack<T>(from[6], from[7])};
  }
}

// A row of y with its position, eight columns of every 256 in a lane.
struct HeldRow {
  float of[kHeld][8];
  float mean = 0.0f, rstd = 1.0f;
};

__device__ __forceinline__ int held_column(int n) { return (n * 32 + simt::lane()) * 8; }

template <class T>
__device__ __forceinline__ void hold_row(const T* y, const Place<T>& place, int width, HeldRow& row) {
#pragma unroll
  for (int n = 0; n < kHeld; ++n) {
    const int column = held_column(n);
    if (column >= width) break;
    load_eight(y + column, row.of[n]);
    if (place.row != nullptr) {
      float own[8];
      load_eight(place.row + column, own);
#pragma unroll
      for (int i = 0; i < 8; ++i) row.of[n][i] += own[i];
    }
    if (place.lost)
#pragma unroll
      for (int i = 0; i < 8; ++i) row.of[n][i] = __uint_as_float(0x7FC00000u);
  }
}

__device__ __forceinline__ void take_statistics(int width, float eps, HeldRow& row) {
  float sum = 0.0f, spread = 0.0f;
#pragma unroll
  for (int n = 0; n < kHeld; ++n)
    if (held_column(n) < width)
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += row.of[n][i];
  row.mean = simt::warp_sum(sum) / static_cast<float>(width);
#pragma unroll
  for (int n = 0; n < kHeld; ++n)
    if (held_column(n) < width)
#pragma unroll
      for (int i = 0; i < 8; ++i) spread += (row.of[n][i] - row.mean) * (row.of[n][i] - row.mean);
  row.rstd = 1.0f / sqrtf(simt::warp_sum(spread) / static_cast<float>(width) + eps);
}

// Positions and LayerNorm, a warp a row.
template <class T>
__device__ __forceinline__ void finish_rows(const Embedding<T>& e, const Tile& tile, int width, T* y) {
  if (e.position == nullptr && e.ln_weight == nullptr) return;
  for (int r = simt::warp(); r < tile.count; r += kWarps) {
    T* const own = y + static_cast<i64>(r) * width;
    HeldRow row;
    hold_row(own, place_of(e, tile, r, width), width, row);
    if (e.ln_weight != nullptr) take_statistics(width, e.eps, row);
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const int column = held_column(n);
      if (column >= width) break;
      if (e.ln_weight != nullptr) {
        float gain[8], shift[8];
        load_eight(e.ln_weight + column, gain);
        load_eight(e.ln_bias + column, shift);
#pragma unroll
        for (int i = 0; i < 8; ++i) row.of[n][i] = (row.of[n][i] - row.mean) * row.rstd * gain[i] + shift[i];
      }
      store_eight(row.of[n], own + column);
    }
  }
}

// What a row's gradient needs beside its own numbers: dy = rstd (g - mean_g - unit mean_gu), g = dout gain.
struct RowGradient {
  float mean, rstd, mean_g, mean_gu;
};

template <class T>
__device__ __forceinline__ RowGradient row_gradient(const Embedding<T>& e, HeldRow& row, const T* dout, int width) {
  float sum_g = 0.0f, sum_gu = 0.0f;
  take_statistics(width, e.eps, row);
#pragma unroll
  for (int n = 0; n < kHeld; ++n) {
    const int column = held_column(n);
    if (column >= width) break;
    float outer[8], gain[8];
    load_eight(dout + column, outer);
    load_eight(e.ln_weight + column, gain);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float g = outer[i] * gain[i];
      sum_g += g;
      sum_gu += g * (row.of[n][i] - row.mean) * row.rstd;
    }
  }
  const float share = 1.0f / static_cast<float>(width);
  return {row.mean, row.rstd, simt::warp_sum(sum_g) * share, simt::warp_sum(sum_gu) * share};
}

// y [rows, width] becomes dy. parts [3, tiles, width] get the tile's sums of dy, dout unit and dout: a thread owns
// two columns and goes down the rows. All threads.
template <class T>
__device__ __forceinline__ void differentiate_rows(const Embedding<T>& e, const Tile& tile, int width, const T* dout,
                                                   T* y, float* parts, i64 part_step, RowGradient* rows) {
  for (int r = simt::warp(); r < tile.count; r += kWarps) {
    HeldRow row;
    hold_row(y + static_cast<i64>(r) * width, place_of(e, tile, r, width), width, row);
    const RowGradient own = row_gradient(e, row, dout + static_cast<i64>(r) * width, width);
    if (simt::lane() == 0) rows[r] = own;
  }
  simt::sync_block();
  for (int column = static_cast<int>(threadIdx.x) * 2; column < width; column += 2 * kTokens) {
    float sums[3][2] = {};
    const float gain[2] = {e.ln_weight[column], e.ln_weight[column + 1]};
    for (int r = 0; r < tile.count; ++r) {
      const i64 at = static_cast<i64>(r) * width + column;
      const Place<T> place = place_of(e, tile, r, width);
      const RowGradient& own = rows[r];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float value = simt::to_float(y[at + i]);
        if (place.row != nullptr) value += simt::to_float(place.row[column + i]);
        const float outer = simt::to_float(dout[at + i]), unit = (value - own.mean) * own.rstd;
        const float dy = own.rstd * (outer * gain[i] - own.mean_g - unit * own.mean_gu);
        y[at + i] = simt::from_float<T>(dy);
        sums[0][i] += dy;
        sums[1][i] += outer * unit;
        sums[2][i] += outer;
      }
    }
#pragma unroll
    for (int kind = 0; kind < 3; ++kind)
#pragma unroll
      for (int i = 0; i < 2; ++i) parts[kind * part_step + column + i] = sums[kind][i];
  }
}

}  // namespace
}  // namespace ofakern

// The products of patch_embed: 128 x 128 of a result in a block of four warps, 64 x 64 in each, by mma.sync; operands
// pass through shared memory in steps, weights by asynchronous copies three deep, pixels through registers. float32
// has no such instruction and multiplies one by one.
#pragma once

#include "ops/patch_embed/patch_embed_pixels.cuh"

namespace ofakern {
namespace {

constexpr int kColumns = 128;  // of a block's result
constexpr int kStep = 64;      // pixels of a step of the rows' product
constexpr int kSumStep = 32;   // tokens of a step of the weight's gradient
constexpr int kDeep = 3;       // steps whose weights are on their way or in use
constexpr int kTileElements = 128 * kStep;
constexpr int kSumElements = kSumStep * 128;

// Rows of 16-byte pieces, permuted so that eight rows of a column of pieces lie in different banks.
template <int kPieces>
__device__ __forceinline__ int piece_at(int row, int piece) {
  return (row * kPieces + (piece ^ (row & 7))) * 8;
}

// A warp's share.
template <class T>
struct WarpSums {
  float of[4][8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) of[m][n][i] = 0.0f;
  }

  __device__ __forceinline__ void add(const unsigned (&a)[4][4], const unsigned (&b)[4][4]) {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const unsigned pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
        simt::mma_16x8x16<T>(of[m][n], a[m], pair);
      }
  }

  // a [128, kStep] and b [128, kStep], both along the depth.
  __device__ __forceinline__ void multiply(const T* a, const T* b) {
    const int row = (simt::warp() & 1) * 64, column = (simt::warp() >> 1) * 64, lane = simt::lane();
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      unsigned left[4][4], right[4][4];
#pragma unroll
      for (int m = 0; m < 4; ++m)
        simt::load_matrix_x4(left[m], a + piece_at<8>(row + m * 16 + (lane & 15), 2 * k + (lane >> 4)));
#pragma unroll
      for (int n = 0; n < 4; ++n)
        simt::load_matrix_x4(
            right[n], b + piece_at<8>(column + n * 16 + (lane & 7) + (lane >> 4) * 8, 2 * k + ((lane >> 3) & 1)));
      add(left, right);
    }
  }

  // a [kSumStep, 128] and b [kSumStep, 128], both across the depth.
  __device__ __forceinline__ void multiply_across(const T* a, const T* b) {
    const int row = (simt::warp() & 1) * 8, column = (simt::warp() >> 1) * 8, lane = simt::lane();  // pieces
#pragma unroll
    for (int k = 0; k < kSumStep / 16; ++k) {
      unsigned left[4][4], right[4][4];
      const int low = k * 16 + (lane & 7);
#pragma unroll
      for (int m = 0; m < 4; ++m)
        simt::load_matrix_x4_transposed(left[m],
                                        a + piece_at<16>(low + (lane >> 4) * 8, row + m * 2 + ((lane >> 3) & 1)));
#pragma unroll
      for (int n = 0; n < 4; ++n)
        simt::load_matrix_x4_transposed(right[n],
                                        b + piece_at<16>(low + ((lane >> 3) & 1) * 8, column + n * 2 + (lane >> 4)));
      add(left, right);
    }
  }
};

// ---- rows of y ------------------------------------------------------------------------------------------------------

// What a tile's rows are made of.
template <class T>
struct RowProduct {
  const Patch& p;
  const Tile& tile;
  const T* folded;      // [columns of whole tiles, ld]
  const float* vector;  // [columns of whole tiles]
  float scale;
  int width;
  T* y;  // the tile's first row of [.., width]
};

template <class T>
constexpr std::size_t row_shared_bytes(int ld, bool vectors) {
  const std::size_t offsets = 4 * static_cast<std::size_t>(vectors ? ld / 16 : ld);
  if (std::is_same_v<T, float>) return offsets + 2 * 128 * 17 * sizeof(float);
  return offsets + (2 + kDeep) * kTileElements * 2;
}

template <class T>
class RowLoads {
 public:
  __device__ __forceinline__ RowLoads(const RowProduct<T>& product, T* pixels, T* weights, const int* offsets)
      : product_(product), pixels_(pixels), weights_(weights), offsets_(offsets) {
    const ImageSet& set = *product.tile.set;
    there_ = static_cast<int>(threadIdx.x) < product.tile.count;
    corner_ = there_ ? corner_of(set, product.p, product.tile.first + static_cast<int>(threadIdx.x)) : 0;
    steps_ = product.p.ld / kStep;
  }

  // Into registers, where pixels come 16 bytes at a time.
  __device__ __forceinline__ void fetch(int step) {
    const Patch& p = product_.p;
    if (!p.vectors) return;
    const int first = step % steps_ * (kStep / 16);
    const auto* from = static_cast<const std::uint8_t*>(product_.tile.set->data) + corner_;
    constexpr unsigned kMiddle = 0x80808080u;  // 0 once centred
#pragma unroll
    for (int n = 0; n < kStep / 16; ++n) {
      held_[n] = {kMiddle, kMiddle, kMiddle, kMiddle};
      if (there_ && (first + n) * 16 < p.depth) held_[n] = *reinterpret_cast<const uint4*>(from + offsets_[first + n]);
    }
  }

  __device__ __forceinline__ void store(int step) const {
    const Patch& p = product_.p;
    const int row = static_cast<int>(threadIdx.x), first = step % steps_ * kStep;
    T* const to = pixels_ + step % 2 * kTileElements;
    if (p.vectors) {
#pragma unroll
      for (int n = 0; n < kStep / 16; ++n)
        store_centred(held_[n], to + piece_at<8>(row, 2 * n), to + piece_at<8>(row, 2 * n + 1));
      return;
    }
    for (int n = 0; n < kStep / 8; ++n)
      store_gathered(p, product_.tile.set->data, corner_, offsets_, 0, first + n * 8, there_, to + piece_at<8>(row, n));
  }

  __device__ __forceinline__ void copy_weights(int step) const {
    const int first = step % steps_ * kStep, column = step / steps_ * kColumns;
    T* const to = weights_ + step % kDeep * kTileElements;
#pragma unroll
    for (int n = 0; n < kColumns * 8 / kTokens; ++n) {
      const int index = n * kTokens + static_cast<int>(threadIdx.x), own = index / 8, piece = index % 8;
      simt::copy_async_16(to + piece_at<8>(own, piece),
                          product_.folded + static_cast<i64>(column + own) * product_.p.ld + first + piece * 8);
    }
  }

 private:
  const RowProduct<T>& product_;
  T *pixels_, *weights_;
  const int* offsets_;
  uint4 held_[kStep / 16];
  i64 corner_;
  int steps_;
  bool there_;
};

// Columns [first, first + 128) of the tile's rows. Pairs of lanes exchange halves, so that each writes four neighbours.
template <class T>
__device__ __forceinline__ void write_columns(const RowProduct<T>& product, const WarpSums<T>& sums, int first) {
  const int lane = simt::lane(), odd = lane & 1;
  const int row = (simt::warp() & 1) * 64 + lane / 4, column = first + (simt::warp() >> 1) * 64;
#pragma unroll
  for (int n = 0; n < 8; n += 2) {
    const int own = column + n * 8 + lane % 4 * 2;
    const float2 low = *reinterpret_cast<const float2*>(product.vector + own);
    const float2 high = *reinterpret_cast<const float2*>(product.vector + own + 8);
    const int target = column + (n + odd) * 8 + lane % 4 / 2 * 4;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float (&a)[4] = sums.of[m][n], (&b)[4] = sums.of[m][n + 1];
        const unsigned near = pack<T>(a[2 * h] * product.scale + low.x, a[2 * h + 1] * product.scale + low.y);
        const unsigned far = pack<T>(b[2 * h] * product.scale + high.x, b[2 * h + 1] * product.scale + high.y);
        const unsigned other = simt::shuffle_xor(odd ? near : far, 1);
        const int at = row + m * 16 + h * 8;
        if (at < product.tile.count && target < product.width)
          *reinterpret_cast<uint2*>(product.y + static_cast<i64>(at) * product.width + target) =
              odd ? uint2{other, far} : uint2{near, other};
      }
  }
}

// All threads of the block; ends with a barrier.
template <class T>
__device__ __forceinline__ void multiply_rows(const RowProduct<T>& product, std::byte* shared) {
  T* const pixels = reinterpret_cast<T*>(shared);
  T* const weights = pixels + 2 * kTileElements;
  int* const offsets = reinterpret_cast<int*>(weights + kDeep * kTileElements);
  fill_offsets(*product.tile.set, product.p, 0, product.p.ld, offsets);
  simt::sync_block();
  RowLoads<T> loads(product, pixels, weights, offsets);
  const int steps = product.p.ld / kStep, all = (product.width + kColumns - 1) / kColumns * steps;
  loads.fetch(0);
  for (int s = 0; s < kDeep - 1; ++s) {
    if (s < all) loads.copy_weights(s);
    simt::copy_async_commit();
  }
  loads.store(0);
  if (all > 1) loads.fetch(1);
  WarpSums<T> sums;
  sums.clear();
  for (int s = 0; s < all; ++s) {
    simt::copy_async_wait<kDeep - 2>();
    simt::sync_block();
    if (s + kDeep - 1 < all) loads.copy_weights(s + kDeep - 1);
    simt::copy_async_commit();
    if (s + 1 < all) loads.store(s + 1);
    if (s + 2 < all) loads.fetch(s + 2);
    sums.multiply(pixels + s % 2 * kTileElements, weights + s % kDeep * kTileElements);
    if (s % steps == steps - 1) {
      write_columns(product, sums, s / steps * kColumns);
      sums.clear();
    }
  }
  simt::sync_block();
}

// float32: a thread owns a token and sixteen columns after the other.
__device__ __forceinline__ void multiply_rows(const RowProduct<float>& product, std::byte* shared) {
  constexpr int kDepth = 16, kLd = 17;
  float* const pixels = reinterpret_cast<float*>(shared);  // [128, kLd]
  float* const weights = pixels + 128 * kLd;
  int* const offsets = reinterpret_cast<int*>(weights + 128 * kLd);
  const Patch& p = product.p;
  const int mine = static_cast<int>(threadIdx.x);
  const bool there = mine < product.tile.count;
  const i64 corner = there ? corner_of(*product.tile.set, p, product.tile.first + mine) : 0;
  fill_offsets(*product.tile.set, p, 0, p.ld, offsets);
  for (int first = 0; first < product.width; first += kDepth) {
    float sums[kDepth] = {};
    for (int k = 0; k < p.ld; k += kDepth) {
      simt::sync_block();
      for (int n = 0; n < kDepth; n += 8)
        store_gathered(p, product.tile.set->data, corner, offsets, 0, k + n, there, pixels + mine * kLd + n);
      for (int n = mine; n < kDepth * kDepth; n += kTokens)
        weights[n / kDepth * kLd + n % kDepth] =
            product.folded[static_cast<i64>(first + n / kDepth) * p.ld + k + n % kDepth];
      simt::sync_block();
#pragma unroll
      for (int c = 0; c < kDepth; ++c) {
        float part = 0.0f;  // a long sum is one of shorter ones: fewer roundings
#pragma unroll
        for (int n = 0; n < kDepth; ++n) part += pixels[mine * kLd + n] * weights[c * kLd + n];
        sums[c] += part;
      }
    }
#pragma unroll
    for (int c = 0; c < kDepth; ++c)
      if (there && first + c < product.width)
        product.y[static_cast<i64>(mine) * product.width + first + c] =
            sums[c] * product.scale + product.vector[first + c];
  }
  simt::sync_block();
}

}  // namespace
}  // namespace ofakern

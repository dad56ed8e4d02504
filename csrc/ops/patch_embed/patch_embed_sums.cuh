// What the backward pass sums over tokens. Every sum has one owner and an order that shapes fix.
#pragma once

#include "core/check.h"
#include "ops/patch_embed/patch_embed_rows.cuh"

namespace ofakern {
namespace {

constexpr int kSlices = 8;       // of the tiles' parts
constexpr int kSumBlocks = 264;  // of the weight's gradient: two for each multiprocessor of an H200
constexpr int kPartsOfTile = kTokens / kSumStep;

// ---- sums of parts --------------------------------------------------------------------------------------------------

// parts [tiles, width]: sums of 128 rows of dy.
template <class T>
__global__ void __launch_bounds__(kTokens) patch_column_parts(const T* dy, i64 tokens, int width, float* parts) {
  const i64 first = static_cast<i64>(blockIdx.x) * kTokens;
  const int rows = static_cast<int>(min(static_cast<i64>(kTokens), tokens - first));
  for (int column = static_cast<int>(threadIdx.x); column < width; column += kTokens) {
    float sum = 0.0f;
    for (int r = 0; r < rows; ++r) sum += simt::to_float(dy[(first + r) * width + column]);
    parts[static_cast<i64>(blockIdx.x) * width + column] = sum;
  }
}

// totals [kinds, width] of parts [kinds, tiles, width], also to `copies`.
struct Copies {
  float* of[3];
};

__global__ void __launch_bounds__(32 * kSlices)
    patch_part_sums(const float* parts, i64 part_step, int tiles, int width, float* totals, const Copies copies) {
  OFAKERN_SHARED(float, slices, kSlices * 32);
  const int column = static_cast<int>(blockIdx.x) * 32 + simt::lane(), kind = static_cast<int>(blockIdx.y);
  float sum = 0.0f;
  if (column < width)
    for (int tile = simt::warp(); tile < tiles; tile += kSlices)
      sum += parts[kind * part_step + static_cast<i64>(tile) * width + column];
  slices[threadIdx.x] = sum;
  simt::sync_block();
  if (simt::warp() != 0 || column >= width) return;
  float all = 0.0f;
  for (int n = 0; n < kSlices; ++n) all += slices[n * 32 + simt::lane()];
  totals[kind * width + column] = all;
  copies.of[kind][column] = all;
}

// ---- the weight's gradient ------------------------------------------------------------------------------------------

// Tiles [begin, end) of this block's split.
struct TileRange {
  int begin, end;
};

__device__ __forceinline__ TileRange range_of(int tiles, int each) {
  const int begin = static_cast<int>(blockIdx.z) * each;
  return {begin, min(tiles, begin + each)};
}

constexpr std::size_t kSumShared = (2 + kDeep) * kSumElements * 2 + 2 * kTokens * (sizeof(i64) + sizeof(int));

// One block's loads: dy by asynchronous copies, pixels through registers, corners and offsets a tile ahead.
template <class T>
class SumLoads {
 public:
  __device__ __forceinline__ SumLoads(const Images& images, const Patch& p, int begin, int width, const T* dy,
                                      std::byte* shared)
      : images_(images),
        p_(p),
        dy_(dy),
        begin_(begin),
        width_(width),
        first_d_(static_cast<int>(blockIdx.x) * 128),
        first_k_(static_cast<int>(blockIdx.y) * 128) {
    left = reinterpret_cast<T*>(shared);
    right = left + kDeep * kSumElements;
    corners_ = reinterpret_cast<i64*>(right + 2 * kSumElements);
    offsets_ = reinterpret_cast<int*>(corners_ + 2 * kTokens);
  }

  __device__ __forceinline__ void prepare(int number) {
    const Tile tile = tile_at(images_, begin_ + number);
    const int mine = static_cast<int>(threadIdx.x);
    corners_[number % 2 * kTokens + mine] = mine < tile.count ? corner_of(*tile.set, p_, tile.first + mine) : 0;
    fill_offsets(*tile.set, p_, first_k_, 128, offsets_ + number % 2 * kTokens);
  }

  __device__ __forceinline__ void copy_gradient(int step) const {
    const Tile tile = tile_at(images_, begin_ + step / kPartsOfTile);
    const i64 first = tile.set->first_token + tile.first;
#pragma unroll
    for (int n = 0; n < kSumStep * 16 / kTokens; ++n) {
      const int index = n * kTokens + static_cast<int>(threadIdx.x), row = index / 16, piece = index % 16;
      const int token = step % kPartsOfTile * kSumStep + row, d = first_d_ + piece * 8;
      const bool valid = token < tile.count && d < width_;
      simt::copy_async_16(left + step % kDeep * kSumElements + piece_at<16>(row, piece),
                          valid ? dy_ + (first + token) * width_ + d : dy_, valid);
    }
  }

  __device__ __forceinline__ void fetch(int step) {
    if (!p_.vectors) return;
    const Source from = source(step);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int group = static_cast<int>(threadIdx.x) % 4 * 2 + n;
      held_[n] = {kMiddle, kMiddle, kMiddle, kMiddle};
      if (from.there && first_k_ + group * 16 < p_.depth)
        held_[n] = *reinterpret_cast<const uint4*>(static_cast<const std::uint8_t*>(from.data) + from.corner +
                                                   from.offsets[group]);
    }
  }

  __device__ __forceinline__ void store(int step) const {
    const int row = static_cast<int>(threadIdx.x) / 4, quarter = static_cast<int>(threadIdx.x) % 4;
    T* const to = right + step % 2 * kSumElements;
    if (p_.vectors) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int piece = quarter * 4 + n * 2;
        store_centred(held_[n], to + piece_at<16>(row, piece), to + piece_at<16>(row, piece + 1));
      }
      return;
    }
    const Source from = source(step);
    for (int n = 0; n < 4; ++n) {
      const int piece = quarter * 4 + n;
      store_gathered(p_, from.data, from.corner, from.offsets, first_k_, first_k_ + piece * 8, from.there,
                     to + piece_at<16>(row, piece));
    }
  }

  T *left, *right;  // [kDeep, kSumStep, 128], [2, kSumStep, 128]

 private:
  static constexpr unsigned kMiddle = 0x80808080u;  // 0 once centred

  struct Source {
    const void* data;
    i64 corner;
    const int* offsets;
    bool there;
  };
  __device__ __forceinline__ Source source(int step) const {
    const int number = step / kPartsOfTile, token = step % kPartsOfTile * kSumStep + static_cast<int>(threadIdx.x) / 4;
    const Tile tile = tile_at(images_, begin_ + number);
    return {tile.set->data, corners_[number % 2 * kTokens + token], offsets_ + number % 2 * kTokens,
            token < tile.count};
  }

  const Images& images_;
  const Patch& p_;
  const T* dy_;
  i64* corners_;
  int* offsets_;
  uint4 held_[2];
  int begin_, width_, first_d_, first_k_;
};

// sums [splits, width, depth]: dy times the pixels as the product takes them.
template <class T>
__global__ void __launch_bounds__(kTokens) patch_weight_sums(const __grid_constant__ Images images, const Patch patch,
                                                             int tiles, int each, int width, const T* dy, float* sums) {
  const TileRange range = range_of(tiles, each);
  SumLoads<T> loads(images, patch, range.begin, width, dy, simt::dynamic_shared());
  const int all = (range.end - range.begin) * kPartsOfTile;
  loads.prepare(0);
  simt::sync_block();
  loads.fetch(0);
  for (int s = 0; s < kDeep - 1; ++s) {
    if (s < all) loads.copy_gradient(s);
    simt::copy_async_commit();
  }
  loads.store(0);
  if (all > 1) loads.fetch(1);
  WarpSums<T> total;
  total.clear();
  for (int s = 0; s < all; ++s) {
    simt::copy_async_wait<kDeep - 2>();
    simt::sync_block();
    if (s % kPartsOfTile == 0 && s + kPartsOfTile < all) loads.prepare(s / kPartsOfTile + 1);
    if (s + kDeep - 1 < all) loads.copy_gradient(s + kDeep - 1);
    simt::copy_async_commit();
    if (s + 1 < all) loads.store(s + 1);
    if (s + 2 < all) loads.fetch(s + 2);
    total.multiply_across(loads.left + s % kDeep * kSumElements, loads.right + s % 2 * kSumElements);
  }
  const int d = static_cast<int>(blockIdx.x) * 128 + (simt::warp() & 1) * 64 + simt::lane() / 4;
  const int k = static_cast<int>(blockIdx.y) * 128 + (simt::warp() >> 1) * 64 + simt::lane() % 4 * 2;
  float* const own = sums + static_cast<i64>(blockIdx.z) * width * patch.depth;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = d + m * 16 + i / 2 * 8, column = k + n * 8 + i % 2;
        if (row < width && column < patch.depth) own[static_cast<i64>(row) * patch.depth + column] = total.of[m][n][i];
      }
}

constexpr int kPlainRows = 32, kPlainColumns = 64, kPlainTokens = 16;

// The same in float32: a thread owns 4 x 4 of 32 x 64.
__global__ void __launch_bounds__(kTokens)
    patch_weight_sums_f32(const __grid_constant__ Images images, const Patch patch, int tiles, int each, int width,
                          const float* dy, float* sums) {
  OFAKERN_SHARED(float, left, kPlainTokens*(kPlainRows + 1));
  OFAKERN_SHARED(float, right, kPlainTokens*(kPlainColumns + 1));
  OFAKERN_SHARED(int, offsets, kPlainColumns);
  const TileRange range = range_of(tiles, each);
  const int d = static_cast<int>(blockIdx.x) * kPlainRows, k = static_cast<int>(blockIdx.y) * kPlainColumns;
  const int mine = static_cast<int>(threadIdx.x), row = mine / 16 * 4, column = mine % 16;
  float total[4][4] = {};
  for (int step = range.begin * (kTokens / kPlainTokens); step < range.end * (kTokens / kPlainTokens); ++step) {
    const Tile tile = tile_at(images, step / (kTokens / kPlainTokens));
    const int base = step % (kTokens / kPlainTokens) * kPlainTokens, own = base + mine / 8;
    const bool there = own < tile.count;
    simt::sync_block();
    fill_offsets(*tile.set, patch, k, kPlainColumns, offsets);
    for (int n = mine; n < kPlainTokens * kPlainRows; n += kTokens) {
      const int token = base + n / kPlainRows, dn = d + n % kPlainRows;
      left[n / kPlainRows * (kPlainRows + 1) + n % kPlainRows] =
          token < tile.count && dn < width ? dy[(tile.set->first_token + tile.first + token) * width + dn] : 0.0f;
    }
    simt::sync_block();
    store_gathered(patch, tile.set->data, there ? corner_of(*tile.set, patch, tile.first + own) : 0, offsets, k,
                   k + mine % 8 * 8, there, right + mine / 8 * (kPlainColumns + 1) + mine % 8 * 8);
    simt::sync_block();
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float part = 0.0f;  // a long sum is one of shorter ones: fewer roundings
#pragma unroll
        for (int t = 0; t < kPlainTokens; ++t)
          part += left[t * (kPlainRows + 1) + row + i] * right[t * (kPlainColumns + 1) + column + j * 16];
        total[i][j] += part;
      }
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j)
      if (d + row + i < width && k + column + j * 16 < patch.depth)
        sums[(static_cast<i64>(blockIdx.z) * width + d + row + i) * patch.depth + k + column + j * 16] = total[i][j];
}

// dweight = scale (sum of dy times centred pixels) + offset (sum of dy), in the weight's own order.
template <class T>
__global__ void __launch_bounds__(kTokens)
    patch_weight_gradient(const float* sums, i64 splits, const float* totals, const __grid_constant__ Channels channels,
                          int width, int depth, T* dweight) {
  const int k = static_cast<int>(blockIdx.x) * kTokens + static_cast<int>(threadIdx.x);
  const int d = static_cast<int>(blockIdx.y);
  if (k >= depth) return;
  float sum = 0.0f;
  for (i64 split = 0; split < splits; ++split) sum += sums[(split * width + d) * depth + k];
  const Native native = native_of(channels, k);
  dweight[static_cast<i64>(d) * depth + native.at] =
      simt::from_float<T>(channels.scale[native.channel] * sum + channels.offset[native.channel] * totals[d]);
}

// ---- the position table's gradient ----------------------------------------------------------------------------------

// A block owns a row of the table, a thread eight columns of it; order and offsets as in PatchEmbedPlaces.
template <class T>
__global__ void __launch_bounds__(kTokens)
    patch_position_gradient(const i64* order, const i64* offsets, i64 images, i64 per_image, const T* dy, int width,
                            T* dposition) {
  const i64 place = blockIdx.x;
  const int column = static_cast<int>(blockIdx.y * kTokens + threadIdx.x) * 8;
  if (column >= width) return;
  i64 begin = 0, end = place < per_image ? images : 0;
  if (order != nullptr) begin = offsets[place], end = offsets[place + 1];
  float sums[8] = {};
  for (i64 n = begin; n < end; ++n) {
    float own[8];
    load_eight(dy + (order != nullptr ? order[n] : n * per_image + place) * width + column, own);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += own[i];
  }
  store_eight(sums, dposition + place * width + column);
}

// ---- launches -------------------------------------------------------------------------------------------------------

struct SumSizes {
  i64 width, tokens, tiles;
  Patch patch;
};

unsigned blocks_of(i64 n, i64 each) { return static_cast<unsigned>((n + each - 1) / each); }

// Into how many runs the tiles of a launch are cut.
i64 sum_splits(i64 width, i64 depth, i64 tiles) {
  const i64 blocks = static_cast<i64>(blocks_of(width, 128)) * blocks_of(depth, 128);
  const i64 wanted = kSumBlocks / blocks > 0 ? kSumBlocks / blocks : 1;
  const i64 each = (tiles + wanted - 1) / wanted;
  return (tiles + each - 1) / each;
}

void check_places(const PatchEmbedInputs& in, const PatchEmbedPlaces& places) {
  if (!in.position.defined()) return;
  constexpr Checker check("patch_embed");
  if (places.order.defined()) {
    check.plain("order", places.order, "[N]", {-1}, DType::i64);
    check.plain("offsets", places.offsets, "[P + 1]", {in.position.shape[0] + 1}, DType::i64);
    return;
  }
  check.that(in.image_count == 1 && !in.position_index.defined(), "order",
             "be given with position_index and with several tensors of images", "None");
}

template <class T>
void launch_column_parts(const SumSizes& s, const T* dy, float* parts, Stream stream) {
  if (s.tokens == 0) return;
  simt::launch<patch_column_parts<T>>({dim3(blocks_of(s.tokens, kTokens)), dim3(kTokens)}, stream, dy, s.tokens,
                                      static_cast<int>(s.width), parts);
}

void launch_part_sums(const SumSizes& s, const float* parts, float* totals, bool norm,
                      const PatchEmbedGradients& gradients, Stream stream) {
  Copies copies = {{gradients.dbias.as<float>(), nullptr, nullptr}};
  if (norm) copies = {{copies.of[0], gradients.dln_weight.as<float>(), gradients.dln_bias.as<float>()}};
  // Without LayerNorm the tiles are those of all tokens in a row.
  const i64 tiles = norm ? s.tiles : (s.tokens + kTokens - 1) / kTokens;
  simt::launch<patch_part_sums>({dim3(blocks_of(s.width, 32), norm ? 3u : 1u), dim3(32 * kSlices)}, stream, parts,
                                s.tiles * s.width, static_cast<int>(tiles), static_cast<int>(s.width), totals, copies);
}

template <class T>
void launch_weight_sums(const SumSizes& s, const Images& images, int tiles, i64 splits, const T* dy, float* sums,
                        Stream stream) {
  const int each = static_cast<int>((tiles + splits - 1) / splits), width = static_cast<int>(s.width);
  const auto runs = static_cast<unsigned>(splits);
  if constexpr (std::is_same_v<T, float>) {
    const dim3 blocks(blocks_of(s.width, kPlainRows), blocks_of(s.patch.depth, kPlainColumns), runs);
    simt::launch<patch_weight_sums_f32>({blocks, dim3(kTokens)}, stream, images, s.patch, tiles, each, width, dy, sums);
  } else {
    const dim3 blocks(blocks_of(s.width, 128), blocks_of(s.patch.depth, 128), runs);
    simt::launch<patch_weight_sums<T>>({blocks, dim3(kTokens), kSumShared}, stream, images, s.patch, tiles, each, width,
                                       dy, sums);
  }
}

template <class T>
void launch_weight_gradient(const SumSizes& s, const Channels& channels, const float* sums, i64 splits,
                            const float* totals, const TensorView& dweight, Stream stream) {
  const dim3 blocks(blocks_of(s.patch.depth, kTokens), static_cast<unsigned>(s.width));
  simt::launch<patch_weight_gradient<T>>({blocks, dim3(kTokens)}, stream, sums, splits, totals, channels,
                                         static_cast<int>(s.width), s.patch.depth, dweight.as<T>());
}

template <class T>
void launch_position_gradient(const PatchEmbedInputs& in, const PatchEmbedPlaces& places, const T* dy,
                              const TensorView& dposition, Stream stream) {
  const i64 rows = dposition.shape[0], width = dposition.shape[1];
  if (rows == 0) return;
  const bool sorted = places.order.defined();
  i64 per_image = 0;
  if (!sorted) {
    const TensorView& x = in.images[0];
    const i64* patch = in.weight.shape + 2;
    per_image = x.shape[1] / patch[0] * (x.shape[3] / patch[1]) * (x.shape[4] / patch[2]);
  }
  simt::launch<patch_position_gradient<T>>(
      {dim3(static_cast<unsigned>(rows), blocks_of(width, kTokens * 8)), dim3(kTokens)}, stream,
      sorted ? places.order.as<const i64>() : nullptr, sorted ? places.offsets.as<const i64>() : nullptr,
      sorted ? 0 : in.images[0].shape[0], per_image, dy, static_cast<int>(width), dposition.as<T>());
}

}  // namespace
}  // namespace ofakern

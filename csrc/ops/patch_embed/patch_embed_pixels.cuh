// Where a tile of tokens finds its pixels, and how these come into shared memory.
//
// A patch is runs of `run` contiguous pixels, `height` of them per frame, `frames` frames per plane: rows of W, a plane
// per channel, or rows of (W, C) in one plane. 8-bit pixels are taken less 128: integers of 8 bits, exact in every
// type.
#pragma once

#include "core/simt.h"
#include "ops/patch_embed/patch_embed.h"

namespace ofakern {
namespace {

using i64 = std::int64_t;

constexpr int kTokens =
    128;  // of a tile, and threads of a block: in the rows' kernel a thread brings one token's pixels
constexpr int kImages = 32;  // tensors of images that one launch takes, by value
constexpr float kCentre = 128.0f;

constexpr int kMaxChannels = 16;
constexpr i64 kDeepest = 8192;  // pixels of a patch

// The folding, channel by channel.
struct Channels {
  float ratio[kMaxChannels], constant[kMaxChannels];  // the weight's factor; what its rounded entry adds to y
  float scale[kMaxChannels], offset[kMaxChannels];    // pixel' = scale (pixel - centre) + offset
  int count, volume;
  bool interleaved;
};

// Which entry of the weight's row goes with pixel k of a packed patch.
struct Native {
  int channel, at;
};

__device__ __forceinline__ Native native_of(const Channels& c, int k) {
  if (!c.interleaved) return {k / c.volume, k};
  const int channel = k % c.count;
  return {channel, channel * c.volume + k / c.count};
}

struct ImageSet {
  const void* data;
  i64 n_stride, t_stride, c_stride, h_stride;  // elements
  i64 first_token;                             // in the packed order
  int rows, columns, per_image;                // patches
  int tokens, first_tile;                      // of this launch
};

struct Images {
  ImageSet of[kImages];
  int count;
};

struct Patch {
  int frames, height, run;
  int depth;  // pixels of a patch
  int ld;     // depth rounded up to whole steps of the product
  DType pixel;
  bool vectors;  // 16 bytes of pixels at a time: bytes, runs and strides all multiples of 16
};

struct Tile {
  const ImageSet* set;
  int first;  // token inside the set
  int count;
};

__device__ __forceinline__ Tile tile_at(const Images& images, int tile) {
  int n = 0;
  while (n + 1 < images.count && images.of[n + 1].first_tile <= tile) ++n;
  const ImageSet* set = &images.of[n];
  const int first = (tile - set->first_tile) * kTokens;
  return {set, first, min(kTokens, set->tokens - first)};
}

// Where a token's patch starts.
__device__ __forceinline__ i64 corner_of(const ImageSet& s, const Patch& p, int token) {
  const int image = token / s.per_image, number = token - image * s.per_image;
  const int line = number / s.columns, column = number - line * s.columns;
  const int frame = line / s.rows, row = line - frame * s.rows;
  return image * s.n_stride + static_cast<i64>(frame) * p.frames * s.t_stride +
         static_cast<i64>(row) * p.height * s.h_stride + static_cast<i64>(column) * p.run;
}

// Pixel k of a patch, from the patch's corner on.
__device__ __forceinline__ int offset_of(const ImageSet& s, const Patch& p, int k) {
  const int line = k / p.run, x = k - line * p.run;
  const int row = line % p.height, sheet = line / p.height;
  return static_cast<int>(sheet / p.frames * s.c_stride + sheet % p.frames * s.t_stride + row * s.h_stride) + x;
}

// The offsets of pixels [first, first + count): one for every 16 where these are contiguous. All threads take part.
__device__ __forceinline__ void fill_offsets(const ImageSet& s, const Patch& p, int first, int count, int* offsets) {
  const int step = p.vectors ? 16 : 1;
  for (int n = static_cast<int>(threadIdx.x) * step; n < count; n += kTokens * step)
    offsets[n / step] = first + n < p.depth ? offset_of(s, p, first + n) : 0;
}

__device__ __forceinline__ float pixel_at(const void* data, i64 at, DType kind) {
  switch (kind) {
    case DType::u8:
      return static_cast<float>(static_cast<const std::uint8_t*>(data)[at]) - kCentre;
    case DType::bf16:
      return simt::to_float(static_cast<const __nv_bfloat16*>(data)[at]);
    case DType::f16:
      return simt::to_float(static_cast<const __half*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

// Two numbers as the tensor cores take them.
template <class T>
__device__ __forceinline__ unsigned pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&both);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&both);
  }
}

// Four bytes less the centre: 2^23 + u has u for its last bits.
template <class T>
__device__ __forceinline__ uint2 centred(unsigned bytes) {
  float v[4];
#pragma unroll
  for (int n = 0; n < 4; ++n)
    v[n] = __uint_as_float(0x4B000000u | ((bytes >> (8 * n)) & 0xFFu)) - (8388608.0f + kCentre);
  return {pack<T>(v[0], v[1]), pack<T>(v[2], v[3])};
}

// 16 bytes of pixels to 16 numbers: two pieces of 16 bytes.
template <class T>
__device__ __forceinline__ void store_centred(const uint4& bytes, T* first, T* second) {
  const uint2 a = centred<T>(bytes.x), b = centred<T>(bytes.y), c = centred<T>(bytes.z), d = centred<T>(bytes.w);
  *reinterpret_cast<uint4*>(first) = {a.x, a.y, b.x, b.y};
  *reinterpret_cast<uint4*>(second) = {c.x, c.y, d.x, d.y};
}

// Eight pixels from k on, one by one; 0 beyond the patch. offsets: of pixel `origin` and the following ones.
template <class T>
__device__ __forceinline__ void store_gathered(const Patch& p, const void* data, i64 corner, const int* offsets,
                                               int origin, int k, bool there, T* to) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const bool inside = there && k + n < p.depth;
    const int entry = k + n - origin;
    const int offset = p.vectors ? offsets[entry / 16] + entry % 16 : offsets[entry];
    to[n] = simt::from_float<T>(inside ? pixel_at(data, corner + offset, p.pixel) : 0.0f);
  }
}

}  // namespace
}  // namespace ofakern

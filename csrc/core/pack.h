// Packing for gemm.h: from a tensor's rows to A operands and B panels, converting the storage type on the way.
//
// "Units" are 32 bits wide: one f32 or one pair of bf16. Two moves make every layout: interleaving pairs of rows into
// rows of units, and transposing units.
#pragma once

#include "core/gemm.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// What operands of storage type T are packed as.
template <class T>
struct PackedAs {
  using type = float;
};
#if defined(OFAKERN_NATIVE_BF16)
template <>
struct PackedAs<bf16> {
  using type = bf16;
};
#endif
template <class T>
using Packed = typename PackedAs<T>::type;

// Rows of one tensor for one head: element (row, column) is data[row * stride + column].
template <class T>
struct Rows {
  const T* data = nullptr;
  i64 stride = 0;
  i64 width = 0;
};

template <class Elem>
OFAKERN_HOT void zero_row(Elem* dst, i64 padded) {
  std::memset(static_cast<void*>(dst), 0, static_cast<std::size_t>(padded) * sizeof(Elem));
}

// dst[0, width) = src, dst[width, padded) = 0.
template <class T, class Elem>
OFAKERN_LOCAL void copy_row(const T* src, i64 width, Elem* dst, i64 padded) {
  for (i64 x = 0; x < width; x += kWidth) vstore_n(dst + x, vload_n(src + x, width - x), width - x);
  if (width < padded) zero_row(dst + width, padded - width);
}

// Rows are short and many: pieces of a fixed size become moves, where a memcpy of the whole would be a call.
template <class Elem>
OFAKERN_HOT void copy_row(const Elem* src, i64 width, Elem* dst, i64 padded) {
  constexpr i64 kPiece = 64 / sizeof(Elem);
  i64 x = 0;
  for (; x + kPiece <= width; x += kPiece) std::memcpy(static_cast<void*>(dst + x), src + x, 64);
  if (x < width) std::memcpy(static_cast<void*>(dst + x), src + x, static_cast<std::size_t>(width - x) * sizeof(Elem));
  if (width < padded) zero_row(dst + width, padded - width);
}

// Asks for a row that will be read soon: rows of one head lie too far apart for the hardware to see them coming.
template <class T>
OFAKERN_HOT void prefetch_row(const T* src, i64 width) {
  for (i64 x = 0; x < width; x += static_cast<i64>(64 / sizeof(T))) __builtin_prefetch(src + x);
}

template <class T>
OFAKERN_HOT std::uint32_t* as_units(T* p) {
  return reinterpret_cast<std::uint32_t*>(p);
}
template <class T>
OFAKERN_HOT const std::uint32_t* as_units(const T* p) {
  return reinterpret_cast<const std::uint32_t*>(p);
}

// dst[c * dst_stride + r] = src[r * src_stride + c] for units.
OFAKERN_LOCAL void transpose_units(const std::uint32_t* src, i64 src_stride, i64 row_count, i64 column_count,
                                   std::uint32_t* dst, i64 dst_stride) {
  const int rows = static_cast<int>(row_count), columns = static_cast<int>(column_count);
  int r0 = 0;
#if defined(OFAKERN_HAS_TRANSPOSE_BLOCK)
  for (; r0 + 16 <= rows; r0 += 16) {
    int c0 = 0;
    for (; c0 + 16 <= columns; c0 += 16)
      transpose_block(src + r0 * src_stride + c0, src_stride, dst + c0 * dst_stride + r0, dst_stride);
    for (int r = r0; r < r0 + 16; ++r)
      for (int c = c0; c < columns; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
  }
#endif
  for (; r0 < rows; ++r0)
    for (int c = 0; c < columns; ++c) dst[c * dst_stride + r0] = src[r0 * src_stride + c];
}

// Two rows of Elem as one row of units (for f32 the only row is already units).
OFAKERN_HOT void interleave_rows(const bf16* even, const bf16* odd, i64 width, std::uint32_t* dst) {
  i64 x = 0;
#if defined(__AVX512F__)
  for (; x + 16 <= width; x += 16) {
    const __m512i lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + x)));
    const __m512i hi = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + x)));
    _mm512_storeu_si512(dst + x, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
  }
#endif
  for (; x < width; ++x) dst[x] = even[x].bits | static_cast<std::uint32_t>(odd[x].bits) << 16;
}

// Rows [rows, width] (stride `src_stride`, rows even for bf16) as units [rows / kPair, width].
OFAKERN_HOT void interleave(const float* src, i64 src_stride, i64 rows, i64 width, std::uint32_t* dst, i64 dst_stride) {
  for (i64 r = 0; r < rows; ++r)
    std::memcpy(dst + r * dst_stride, src + r * src_stride, static_cast<std::size_t>(width) * sizeof(float));
}
OFAKERN_HOT void interleave(const bf16* src, i64 src_stride, i64 rows, i64 width, std::uint32_t* dst, i64 dst_stride) {
  for (i64 r = 0; r < rows; r += 2)
    interleave_rows(src + r * src_stride, src + (r + 1) * src_stride, width, dst + r / 2 * dst_stride);
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

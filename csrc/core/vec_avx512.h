// AVX-512 (F, BW, DQ, VL): sixteen floats. See vec.h for the meaning of each operation.
#pragma once

// gcc 12 takes the undefined vectors inside its own intrinsics for a mistake (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr int kWidth = 16;
using Mask = __mmask16;
struct Vec {
  __m512 v;
};

OFAKERN_HOT Vec vset(float x) { return {_mm512_set1_ps(x)}; }
OFAKERN_HOT Vec vzero() { return {_mm512_setzero_ps()}; }
OFAKERN_HOT Vec vload(const float* p) { return {_mm512_loadu_ps(p)}; }
OFAKERN_HOT void vstore(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
OFAKERN_HOT Vec vload_masked(const float* p, Mask m) { return {_mm512_maskz_loadu_ps(m, p)}; }
OFAKERN_HOT Vec vload_merge(Vec a, const float* p, Mask m) { return {_mm512_mask_loadu_ps(a.v, m, p)}; }  // p where m
OFAKERN_HOT void vstore_masked(float* p, Vec x, Mask m) { _mm512_mask_storeu_ps(p, m, x.v); }
OFAKERN_HOT Vec vgather(const float* base, const std::int32_t* index, Mask m) {
  const __m512i i = _mm512_maskz_loadu_epi32(m, index);
  return {_mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, i, base, 4)};
}

OFAKERN_HOT Vec vadd(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
OFAKERN_HOT Vec vsub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
OFAKERN_HOT Vec vmul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
OFAKERN_HOT Vec vfma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
OFAKERN_HOT Vec vmax(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
OFAKERN_HOT Vec vselect(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
OFAKERN_HOT float hmax(Vec a) { return _mm512_reduce_max_ps(a.v); }
OFAKERN_HOT float hsum(Vec a) { return _mm512_reduce_add_ps(a.v); }
OFAKERN_HOT bool vany_above(Vec a, float limit) {  // false for NaN
  return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
}

OFAKERN_HOT Mask mask_first(int n) {
  return n >= kWidth ? Mask{0xffff} : n <= 0 ? Mask{0} : static_cast<Mask>((1u << n) - 1u);
}
OFAKERN_HOT Mask mask_bits(std::uint32_t bits) { return static_cast<Mask>(bits); }
OFAKERN_HOT Mask mask_range(int lo, int hi) { return static_cast<Mask>(mask_first(hi) & ~mask_first(lo)); }
OFAKERN_HOT Mask mask_and(Mask a, Mask b) { return static_cast<Mask>(a & b); }
OFAKERN_HOT Mask mask_or(Mask a, Mask b) { return static_cast<Mask>(a | b); }
OFAKERN_HOT Mask mask_andnot(Mask a, Mask b) { return static_cast<Mask>(a & ~b); }
OFAKERN_HOT bool mask_none(Mask m) { return m == 0; }

OFAKERN_HOT Vec widen_bf16(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
OFAKERN_HOT __m256i narrow_bf16(Vec x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
#else
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
}

OFAKERN_HOT Vec vload_as(const float* p) { return vload(p); }
OFAKERN_HOT Vec vload_as(const bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
OFAKERN_HOT Vec vload_as(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
OFAKERN_HOT Vec vload_as(const std::uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
OFAKERN_HOT Vec vload_as(const std::int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
OFAKERN_HOT void vstore_as(float* p, Vec x) { vstore(p, x); }
OFAKERN_HOT void vstore_as(bf16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x)); }
OFAKERN_HOT void vstore_as(f16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

OFAKERN_HOT Vec vload_partial(const float* p, int n) { return vload_masked(p, mask_first(n)); }
OFAKERN_HOT Vec vload_partial(const bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(mask_first(n), p)); }
OFAKERN_HOT Vec vload_partial(const f16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask_first(n), p))};
}
OFAKERN_HOT Vec vload_partial(const std::uint8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask_first(n), p)))};
}
OFAKERN_HOT Vec vload_partial(const std::int8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask_first(n), p)))};
}
OFAKERN_HOT void vstore_partial(float* p, Vec x, int n) { vstore_masked(p, x, mask_first(n)); }
OFAKERN_HOT void vstore_partial(bf16* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, mask_first(n), narrow_bf16(x)); }
OFAKERN_HOT void vstore_partial(f16* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, mask_first(n), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#if defined(__AVX512BF16__)
// Sixteen pairs (even[l], odd[l]), rounded to bf16: the operand order of VDPBF16PS and of AMX's B tiles.
OFAKERN_HOT void vstore_pairs(bf16* p, Vec even, Vec odd) {
  const __m512i lo = _mm512_cvtepu16_epi32(narrow_bf16(even));
  const __m512i hi = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow_bf16(odd)), 16);
  _mm512_storeu_si512(p, _mm512_or_si512(lo, hi));
}
#endif

// dst[c][r] = src[r][c] for a 16 x 16 block of 32-bit units.
OFAKERN_HOT void transpose_block(const std::uint32_t* src, i64 src_stride, std::uint32_t* dst, i64 dst_stride) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(src + i * src_stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int g = 0; g < 16; g += 8)
    for (int i = 0; i < 4; ++i) {
      t[g + i] = _mm512_shuffle_i32x4(r[g + i], r[g + i + 4], 0x88);
      t[g + i + 4] = _mm512_shuffle_i32x4(r[g + i], r[g + i + 4], 0xdd);
    }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(dst + (i + 0) * dst_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(dst + (i + 4) * dst_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(dst + (i + 8) * dst_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_si512(dst + (i + 12) * dst_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}
#define OFAKERN_HAS_TRANSPOSE_BLOCK 1

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

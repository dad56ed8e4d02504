// AVX2 with FMA and F16C: eight floats. See vec.h for the meaning of each operation.
#pragma once

#include <immintrin.h>

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr int kWidth = 8;
struct Mask {
  __m256i m;  // all bits of a lane set or clear
};
struct Vec {
  __m256 v;
};

constexpr float kExp2Floor = -127.0f;  // vexp2 of this and of anything below is 0

OFAKERN_HOT Vec vset(float x) { return {_mm256_set1_ps(x)}; }
OFAKERN_HOT Vec vzero() { return {_mm256_setzero_ps()}; }
OFAKERN_HOT Vec vload(const float* p) { return {_mm256_loadu_ps(p)}; }
OFAKERN_HOT void vstore(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
OFAKERN_HOT Vec vload_masked(const float* p, Mask m) { return {_mm256_maskload_ps(p, m.m)}; }
OFAKERN_HOT Vec vload_merge(Vec a, const float* p, Mask m) {  // p where m
  return {_mm256_blendv_ps(a.v, _mm256_maskload_ps(p, m.m), _mm256_castsi256_ps(m.m))};
}
OFAKERN_HOT void vstore_masked(float* p, Vec x, Mask m) { _mm256_maskstore_ps(p, m.m, x.v); }
OFAKERN_HOT Vec vgather(const float* base, const std::int32_t* index, Mask m) {
  const __m256i i = _mm256_maskload_epi32(index, m.m);
  return {_mm256_mask_i32gather_ps(_mm256_setzero_ps(), base, i, _mm256_castsi256_ps(m.m), 4)};
}

OFAKERN_HOT Vec vadd(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
OFAKERN_HOT Vec vsub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
OFAKERN_HOT Vec vmul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
OFAKERN_HOT Vec vfma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
OFAKERN_HOT Vec vmax(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }  // b where either is NaN
OFAKERN_HOT Vec vmin(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }  // b where either is NaN
OFAKERN_HOT Vec vround(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
OFAKERN_HOT Vec vscale2(Vec a, Vec n) {  // a * 2^n for integral n in [-127, 128], where 2^128 is inf
  const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(e))};
}
OFAKERN_HOT Vec vselect(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(m.m))}; }
OFAKERN_HOT float hmax(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
OFAKERN_HOT float hsum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
OFAKERN_HOT bool vany_above(Vec a, float limit) {  // false for NaN
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, _mm256_set1_ps(limit), _CMP_GT_OQ)) != 0;
}

OFAKERN_HOT __m256i lane_index() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
OFAKERN_HOT Mask mask_first(int n) { return {_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane_index())}; }
OFAKERN_HOT Mask mask_bits(std::uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return {_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane)};
}
OFAKERN_HOT Mask mask_and(Mask a, Mask b) { return {_mm256_and_si256(a.m, b.m)}; }
OFAKERN_HOT Mask mask_or(Mask a, Mask b) { return {_mm256_or_si256(a.m, b.m)}; }
OFAKERN_HOT Mask mask_andnot(Mask a, Mask b) { return {_mm256_andnot_si256(b.m, a.m)}; }
OFAKERN_HOT Mask mask_range(int lo, int hi) { return mask_andnot(mask_first(hi), mask_first(lo)); }
OFAKERN_HOT bool mask_none(Mask m) { return _mm256_testz_si256(m.m, m.m) != 0; }

OFAKERN_HOT Vec vload_as(const float* p) { return vload(p); }
OFAKERN_HOT Vec vload_as(const bf16* p) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))};
}
OFAKERN_HOT Vec vload_as(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
OFAKERN_HOT Vec vload_as(const std::uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
OFAKERN_HOT Vec vload_as(const std::int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
OFAKERN_HOT void vstore_as(float* p, Vec x) { vstore(p, x); }
OFAKERN_HOT void vstore_as(bf16* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q);
  const __m256i chosen = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan)), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
OFAKERN_HOT void vstore_as(f16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

template <class T>
OFAKERN_HOT Vec vload_partial(const T* p, int n) {
  T padded[kWidth] = {};
  for (int l = 0; l < n; ++l) padded[l] = p[l];
  return vload_as(padded);
}
template <class T>
OFAKERN_HOT void vstore_partial(T* p, Vec x, int n) {
  T padded[kWidth];
  vstore_as(padded, x);
  for (int l = 0; l < n; ++l) p[l] = padded[l];
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

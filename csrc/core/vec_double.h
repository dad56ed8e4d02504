// Doubles, half as many as a Vec has floats: for sums whose result is small beside their terms.
#pragma once

#include "core/vec.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr int kDoubles = kWidth / 2;

#if defined(__AVX512F__)
struct VecD {
  __m512d v;
};
OFAKERN_HOT VecD vset(double x) { return {_mm512_set1_pd(x)}; }
OFAKERN_HOT VecD vload(const double* p) { return {_mm512_loadu_pd(p)}; }
OFAKERN_HOT void vstore(double* p, VecD x) { _mm512_storeu_pd(p, x.v); }
OFAKERN_HOT VecD vwiden(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
OFAKERN_HOT void vnarrow(float* p, VecD x) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(x.v)); }
OFAKERN_HOT VecD vadd(VecD a, VecD b) { return {_mm512_add_pd(a.v, b.v)}; }
OFAKERN_HOT VecD vsub(VecD a, VecD b) { return {_mm512_sub_pd(a.v, b.v)}; }
OFAKERN_HOT VecD vmul(VecD a, VecD b) { return {_mm512_mul_pd(a.v, b.v)}; }
OFAKERN_HOT VecD vfma(VecD a, VecD b, VecD c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
#elif defined(__AVX2__)
struct VecD {
  __m256d v;
};
OFAKERN_HOT VecD vset(double x) { return {_mm256_set1_pd(x)}; }
OFAKERN_HOT VecD vload(const double* p) { return {_mm256_loadu_pd(p)}; }
OFAKERN_HOT void vstore(double* p, VecD x) { _mm256_storeu_pd(p, x.v); }
OFAKERN_HOT VecD vwiden(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
OFAKERN_HOT void vnarrow(float* p, VecD x) { _mm_storeu_ps(p, _mm256_cvtpd_ps(x.v)); }
OFAKERN_HOT VecD vadd(VecD a, VecD b) { return {_mm256_add_pd(a.v, b.v)}; }
OFAKERN_HOT VecD vsub(VecD a, VecD b) { return {_mm256_sub_pd(a.v, b.v)}; }
OFAKERN_HOT VecD vmul(VecD a, VecD b) { return {_mm256_mul_pd(a.v, b.v)}; }
OFAKERN_HOT VecD vfma(VecD a, VecD b, VecD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
#else
struct VecD {
  double v[kDoubles];
};
#define OFAKERN_DOUBLES for (int l = 0; l < kDoubles; ++l)
OFAKERN_HOT VecD vset(double x) {
  VecD r;
  OFAKERN_DOUBLES r.v[l] = x;
  return r;
}
OFAKERN_HOT VecD vload(const double* p) {
  VecD r;
  OFAKERN_DOUBLES r.v[l] = p[l];
  return r;
}
OFAKERN_HOT void vstore(double* p, VecD x) { OFAKERN_DOUBLES p[l] = x.v[l]; }
OFAKERN_HOT VecD vwiden(const float* p) {
  VecD r;
  OFAKERN_DOUBLES r.v[l] = static_cast<double>(p[l]);
  return r;
}
OFAKERN_HOT void vnarrow(float* p, VecD x) { OFAKERN_DOUBLES p[l] = static_cast<float>(x.v[l]); }
OFAKERN_HOT VecD vadd(VecD a, VecD b) {
  OFAKERN_DOUBLES a.v[l] += b.v[l];
  return a;
}
OFAKERN_HOT VecD vsub(VecD a, VecD b) {
  OFAKERN_DOUBLES a.v[l] -= b.v[l];
  return a;
}
OFAKERN_HOT VecD vmul(VecD a, VecD b) {
  OFAKERN_DOUBLES a.v[l] *= b.v[l];
  return a;
}
OFAKERN_HOT VecD vfma(VecD a, VecD b, VecD c) {
  OFAKERN_DOUBLES c.v[l] += a.v[l] * b.v[l];
  return c;
}
#undef OFAKERN_DOUBLES
#endif

// What a kernel over either needs to know.
template <class V>
struct Lanes;
template <>
struct Lanes<Vec> {
  using Number = float;
  static constexpr int kCount = kWidth;
};
template <>
struct Lanes<VecD> {
  using Number = double;
  static constexpr int kCount = kDoubles;
};
template <class V>
using Number = typename Lanes<V>::Number;

template <class V>
OFAKERN_HOT V vfrom(const float* p) {  // Lanes<V>::kCount floats
  if constexpr (Lanes<V>::kCount == kWidth)
    return vload(p);
  else
    return vwiden(p);
}
OFAKERN_HOT void vnarrow(float* p, Vec x) { vstore(p, x); }

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

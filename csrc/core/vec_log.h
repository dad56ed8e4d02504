// Natural logarithm and square root over a vector, for kernels that need them.
#pragma once

#include <cmath>

#include "core/vec.h"

namespace ofakern::OFAKERN_ISA {
namespace {

#if defined(__AVX512F__)
OFAKERN_HOT Vec vsqrt(Vec x) { return {_mm512_sqrt_ps(x.v)}; }
// x = mantissa * 2^exponent with the mantissa in [3/4, 3/2): the series below is for values around 1.
OFAKERN_HOT Vec vsplit_log(Vec x, Vec* exponent) {
  const Vec mantissa = {_mm512_getmant_ps(x.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src)};
  *exponent = {_mm512_sub_ps(_mm512_getexp_ps(x.v), _mm512_getexp_ps(mantissa.v))};
  return mantissa;
}
#elif defined(__AVX2__)
OFAKERN_HOT Vec vsqrt(Vec x) { return {_mm256_sqrt_ps(x.v)}; }
OFAKERN_HOT Vec vsplit_log(Vec x, Vec* exponent) {
  // Bits above those of 3/4 count whole powers of two.
  const __m256i bits = _mm256_castps_si256(x.v), base = _mm256_set1_epi32(0x3f400000);
  const __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(bits, base), 23);
  *exponent = {_mm256_cvtepi32_ps(e)};
  return {_mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)))};
}
#endif

#if defined(__AVX2__) || defined(__AVX512F__)
// ln(1 + t) - t + t^2 / 2 over t^3 on [-1/4, 1/2], the minimax polynomial of Cephes' logf.
OFAKERN_HOT Vec log_series(Vec t) {
  Vec p = vset(7.0376836292e-2f);
  p = vfma(p, t, vset(-1.1514610310e-1f));
  p = vfma(p, t, vset(1.1676998740e-1f));
  p = vfma(p, t, vset(-1.2420140846e-1f));
  p = vfma(p, t, vset(1.4249322787e-1f));
  p = vfma(p, t, vset(-1.6668057665e-1f));
  p = vfma(p, t, vset(2.0000714765e-1f));
  p = vfma(p, t, vset(-2.4999993993e-1f));
  return vfma(p, t, vset(3.3333331174e-1f));
}
#endif

// ln(x) for normal x > 0, within 1e-6 and 2 roundings; infinity and NaN stay what they are.
OFAKERN_HOT Vec vlog(Vec x) {
#if defined(__AVX2__) || defined(__AVX512F__)
  Vec exponent;
  const Vec t = vsub(vsplit_log(x, &exponent), vset(1.0f));
  const Vec square = vmul(t, t);
  const Vec low = vfma(vmul(t, square), log_series(t), vmul(square, vset(-0.5f)));
  const Vec result = vfma(exponent, vset(0.693147180559945f), vadd(t, low));
#if defined(__AVX512F__)
  return result;  // the exponent of infinity is infinity, NaN has no other
#else
  return {_mm256_blendv_ps(result.v, x.v, _mm256_cmp_ps(x.v, _mm256_set1_ps(INFINITY), _CMP_NLT_UQ))};
#endif
#else
  for (int l = 0; l < kWidth; ++l) x.v[l] = std::log(x.v[l]);
  return x;
#endif
}
#if !defined(__AVX2__) && !defined(__AVX512F__)
OFAKERN_HOT Vec vsqrt(Vec x) {
  for (int l = 0; l < kWidth; ++l) x.v[l] = std::sqrt(x.v[l]);
  return x;
}
#endif

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

// The standard normal distribution on vectors: what the exact GELU and its derivative are made of.
//
// With t = |x| and e = exp(-t^2 / 2), Phi(-t) = e * Q(t), where Q (a scaled Mills ratio) is smooth: one exponential
// gives the distribution and the density. Q(t) = u * R(t * u), u = 1 / (t + 5/2), R of degree 9, fitted in the
// Chebyshev sense with relative error 1.5e-8 on [0, 14.6]. Phi(x) has an absolute error of at most 1.5e-7 (two units in
// the last place of 1) and, where 0.5 * (1 + erf) loses all digits (x below -5), still a small relative one: that of
// the exponential, 6e-8 * (1 + t^2).
#pragma once

#include "core/vec.h"

namespace ofakern::OFAKERN_ISA {
namespace {

#if defined(__AVX512F__)
OFAKERN_HOT Vec vabs(Vec a) { return {_mm512_abs_ps(a.v)}; }
OFAKERN_HOT Mask mask_negative(Vec a) { return _mm512_movepi32_mask(_mm512_castps_si512(a.v)); }  // by the sign bit
// 1 / a to one unit in the last place, for normal a: a division would take as long as all the rest.
OFAKERN_HOT Vec vreciprocal(Vec a) {
  const __m512 rough = _mm512_rcp14_ps(a.v);
  return {_mm512_fmadd_ps(rough, _mm512_fnmadd_ps(a.v, rough, _mm512_set1_ps(1.0f)), rough)};
}
#elif defined(__AVX2__)
OFAKERN_HOT Vec vabs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
OFAKERN_HOT Mask mask_negative(Vec a) { return {_mm256_srai_epi32(_mm256_castps_si256(a.v), 31)}; }
OFAKERN_HOT Vec vreciprocal(Vec a) { return {_mm256_div_ps(_mm256_set1_ps(1.0f), a.v)}; }
#else
OFAKERN_HOT Vec vabs(Vec a) {
  for (int l = 0; l < kWidth; ++l) a.v[l] = __builtin_fabsf(a.v[l]);
  return a;
}
OFAKERN_HOT Mask mask_negative(Vec a) {
  Mask m = 0;
  for (int l = 0; l < kWidth; ++l) m |= (float_to_bits(a.v[l]) >> 31) << l;
  return m;
}
OFAKERN_HOT Vec vreciprocal(Vec a) {
  for (int l = 0; l < kWidth; ++l) a.v[l] = 1.0f / a.v[l];
  return a;
}
#endif

struct NormalLanes {
  Vec distribution;  // Phi(x)
  Vec density;       // phi(x)
};

// Infinities and NaN give NaN.
OFAKERN_HOT NormalLanes vnormal(Vec x) {
  const Vec t = vabs(x);
  const Vec u = vreciprocal(vadd(t, vset(2.5f)));
  const Vec e = vexp2(vmul(vmul(t, vset(-0.72134752f)), t));
  const Vec s = vmul(t, u);
  Vec r = vset(-8.057052746e-2f);
  r = vfma(r, s, vset(2.829424976e-1f));
  r = vfma(r, s, vset(-3.190371985e-1f));
  r = vfma(r, s, vset(1.435233665e-1f));
  r = vfma(r, s, vset(-1.529592071e-1f));
  r = vfma(r, s, vset(5.716922964e-2f));
  r = vfma(r, s, vset(2.916317096e-1f));
  r = vfma(r, s, vset(1.696335972e-1f));
  r = vfma(r, s, vset(-1.243393556f));
  r = vfma(r, s, vset(1.250000019f));
  const Vec below = vmul(vmul(e, u), r);
  return {vselect(mask_negative(x), below, vsub(vset(1.0f), below)), vmul(e, vset(0.3989422804f))};
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

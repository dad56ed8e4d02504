// The sums of many vectors at once: one reduction after the other takes twice the shuffles.
#pragma once

#include "core/vec.h"

namespace ofakern::OFAKERN_ISA {
namespace {

#if defined(__AVX512F__)
// Four vectors whose lanes of 128 bits hold the four sums of that lane.
OFAKERN_HOT __m512 vsums_in_lanes(const Vec* x) {
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  };
  const __m512d a = halves(x[0].v, x[1].v), b = halves(x[2].v, x[3].v);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}
OFAKERN_HOT __m512 vfold_lanes(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
#endif

// Lane l is the sum of x[l]; x: kWidth vectors.
OFAKERN_HOT Vec vsums(const Vec* x) {
#if defined(__AVX512F__)
  return {vfold_lanes(vfold_lanes(vsums_in_lanes(x), vsums_in_lanes(x + 4)),
                      vfold_lanes(vsums_in_lanes(x + 8), vsums_in_lanes(x + 12)))};
#elif defined(__AVX2__)
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4].v, x[5].v), _mm256_hadd_ps(x[6].v, x[7].v));
  return {_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))};
#else
  Vec sums;
  for (int l = 0; l < kWidth; ++l) sums.v[l] = hsum(x[l]);
  return sums;
#endif
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

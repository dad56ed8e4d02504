// The sum of exponentials of a row in one pass: a chunk's largest value is found while it comes into the nearest cache,
// and when it exceeds all before it the sum moves to it. Chunks are added in f64.
#pragma once

#include <cmath>

#include "core/vec.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr i64 kChunk = 256;  // logits per stored maximum
constexpr float kLowest = -INFINITY;
#if defined(__AVX512F__)
struct DoubleSum {
  __m512d a, b;
};
OFAKERN_HOT DoubleSum dzero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
OFAKERN_HOT void dadd(DoubleSum* s, Vec x) {
  s->a = _mm512_add_pd(s->a, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
  s->b = _mm512_add_pd(s->b, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)));
}
OFAKERN_HOT double dtotal(const DoubleSum& s) { return _mm512_reduce_add_pd(_mm512_add_pd(s.a, s.b)); }
#elif defined(__AVX2__)
struct DoubleSum {
  __m256d a, b;
};
OFAKERN_HOT DoubleSum dzero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
OFAKERN_HOT void dadd(DoubleSum* s, Vec x) {
  s->a = _mm256_add_pd(s->a, _mm256_cvtps_pd(_mm256_castps256_ps128(x.v)));
  s->b = _mm256_add_pd(s->b, _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)));
}
OFAKERN_HOT double dtotal(const DoubleSum& s) {
  const __m256d both = _mm256_add_pd(s.a, s.b);
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(both), _mm256_extractf128_pd(both, 1));
  return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}
#else
struct DoubleSum {
  double v[kWidth];
};
OFAKERN_HOT DoubleSum dzero() { return {}; }
OFAKERN_HOT void dadd(DoubleSum* s, Vec x) {
  for (int l = 0; l < kWidth; ++l) s->v[l] += static_cast<double>(x.v[l]);
}
OFAKERN_HOT double dtotal(const DoubleSum& s) { return (s.v[0] + s.v[1]) + (s.v[2] + s.v[3]); }
#endif

// exp(x) for x <= 0 or a little above; 0 for -inf and far below; NaN stays.
OFAKERN_HOT Vec exp_of(Vec x) {
  // log2 e in two parts: the error of one would have the same sign in all terms.
  const Vec y = vfma(x, vset(1.925963033e-8f), vmul(x, vset(1.44269504088896341f)));
#if defined(__AVX512F__)
  // y - floor(y) is 0 for -inf, and scalef by floor(y) makes that lane 0. 2^f on [0, 1): minimax polynomial that is
  // exact at 0, relative error 2e-9 before rounding.
  const Vec f = {_mm512_reduce_ps(y.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  Vec p = vset(2.1612914861179888e-4f);
  p = vfma(p, f, vset(1.2467846972867846e-3f));
  p = vfma(p, f, vset(9.675451554358006e-3f));
  p = vfma(p, f, vset(5.5485282093286514e-2f));
  p = vfma(p, f, vset(2.402293086051941e-1f));
  p = vfma(p, f, vset(6.931470632553101e-1f));
  p = vfma(p, f, vset(1.0f));
  return {_mm512_scalef_ps(p.v, y.v)};
#else
  return vexp2(y);
#endif
}

// The sum of exp(x) over some of a row, as sum * exp(largest).
struct ExpSum {
  double sum = 0;
  float largest = kLowest;  // of x; a NaN may hide from it, it shows in the sum
};

// The largest of kChunk values.
template <class T>
OFAKERN_HOT float largest_of(const T* p) {
  Vec a = vload_as(p), b = vload_as(p + kWidth);
  for (int i = 2 * kWidth; i < kChunk; i += 2 * kWidth) {
    a = vmax(a, vload_as(p + i));
    b = vmax(b, vload_as(p + i + kWidth));
  }
  return hmax(vmax(a, b));
}

// Adds kChunk values, whose largest is known.
template <class T>
OFAKERN_HOT void add_chunk(const T* x, float largest, ExpSum* into) {
  if (largest > into->largest) {
    into->sum *= into->largest == kLowest ? 1.0 : std::exp(static_cast<double>(into->largest) - largest);
    into->largest = largest;
  }
  const Vec from = vset(into->largest == kLowest ? 0.0f : into->largest);
  Vec a = vzero(), b = vzero();
  for (int i = 0; i < kChunk; i += 2 * kWidth) {
    a = vadd(a, exp_of(vsub(vload_as(x + i), from)));
    b = vadd(b, exp_of(vsub(vload_as(x + i + kWidth), from)));
  }
  DoubleSum sum = dzero();
  dadd(&sum, vadd(a, b));
  into->sum += dtotal(sum);
}

// log of the sum of all parts; NaN when anything in them is no number, or everything is -inf.
OFAKERN_LOCAL double log_of(const ExpSum* parts, i64 count) {
  float largest = kLowest;
  for (i64 i = 0; i < count; ++i) largest = max_of(largest, parts[i].largest);
  if (largest == kLowest) return NAN;
  double total = 0;
  for (i64 i = 0; i < count; ++i)
    total += parts[i].sum * std::exp(static_cast<double>(parts[i].largest) - static_cast<double>(largest));
  return std::log(total) + static_cast<double>(largest);
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

// The sum of exponentials of a row in one pass, without knowing its maximum.
//
// exp(x) = 2^n * m with n = round(x * log2 e) and m a function of x alone, so moving the sum to another power of two is
// exact and the sum does not depend on where in the row its maximum stands. Sums are f64: rows with the same logits in
// another order have the same sum but for 1e-16, so beams that tie keep tying.
#pragma once

#include <cmath>

#include "core/vec.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr i64 kChunk = 256;  // logits per stored maximum
constexpr float kLowest = -INFINITY;
// Beyond it x * log2 e is too coarse: such a piece is summed again with its maximum taken off first.
constexpr float kLargestUnshifted = 1e5f;

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

// x * log2 e - n, to its own last bit.
OFAKERN_HOT Vec fraction_of(Vec x, Vec minus_n) {
#if defined(__AVX2__)
  const Vec r = vfma(x, vset(1.44269504088896341f), minus_n);
  return vfma(x, vset(1.925963033e-8f), r);  // the part of log2 e that f32 leaves out
#else
  Vec r;  // no fused multiplication: the product would be rounded before n is taken off
  for (int l = 0; l < kWidth; ++l)
    r.v[l] = static_cast<float>(static_cast<double>(x.v[l]) * 1.4426950408889634 + static_cast<double>(minus_n.v[l]));
  return r;
#endif
}

// exp(x) * 2^-power; x is first raised to `least`, which must be above (power - 125) ln 2.
OFAKERN_HOT Vec exp_over(Vec x, Vec least, Vec minus_power) {
  x = vmax(least, x);  // NaN stays
  const Vec minus_n = vround(vmul(x, vset(-1.44269504088896341f)));
  return vscale2(exp2_fraction(fraction_of(x, minus_n)), vsub(minus_power, minus_n));
}
OFAKERN_HOT float least_for(float power) { return power * 0.693147181f - 85.0f; }

// exp(x) for x <= 0; 0 far below.
OFAKERN_HOT Vec exp_below(Vec x) {
  const Vec y = exp_over(x, vset(-85.0f), vzero());
#if defined(__AVX512F__)
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-85.0f), _CMP_GE_OQ), y.v)};
#elif defined(__AVX2__)
  return {_mm256_and_ps(y.v, _mm256_cmp_ps(x.v, _mm256_set1_ps(-85.0f), _CMP_GE_OQ))};
#else
  Vec z = y;
  for (int l = 0; l < kWidth; ++l) z.v[l] = x.v[l] >= -85.0f ? y.v[l] : 0.0f;
  return z;
#endif
}

// The sum of exp(x) over some of a row, as sum * 2^power * exp(shift).
struct ExpSum {
  double sum = 0;
  float power = 0;  // integral
  float shift = 0;
  float largest = kLowest;  // of x; NaN may hide here, it shows in the sum
};

// The sum to begin with where the maximum is known.
OFAKERN_HOT ExpSum shifted_sum(float shift) { return {0.0, 0.0f, shift, 0.0f}; }

// Must a sum, made without a shift, be made again with its largest as the shift?
OFAKERN_HOT bool too_coarse(const ExpSum& sum) {
  return __builtin_fabsf(sum.largest) > kLargestUnshifted && sum.largest - sum.largest == 0;
}

OFAKERN_HOT double two_to(float n) { return n < -1022.0f ? 0.0 : std::ldexp(1.0, static_cast<int>(n)); }

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

// Adds kChunk values of x = scale * p - into->shift, whose largest is known.
template <class T>
OFAKERN_HOT void add_chunk(const T* p, float scale, float largest, ExpSum* into) {
  const float x = largest * scale - into->shift;
  if (x > into->largest) {
    const float power = std::nearbyintf(max_of(x, -2 * kLargestUnshifted) * 1.44269504f);
    into->sum *= into->largest == kLowest ? 0.0 : two_to(into->power - power);  // NaN stays
    into->power = power;
    into->largest = x;
  }
  const Vec least = vset(least_for(into->power)), minus_power = vset(-into->power);
  const Vec factor = vset(scale), shift = vset(into->shift);
  DoubleSum sum = dzero();
  for (int i = 0; i < kChunk; i += kWidth)
    dadd(&sum, exp_over(vsub(vmul(vload_as(p + i), factor), shift), least, minus_power));
  into->sum += dtotal(sum);
}

// log of the sum of all parts; NaN when anything in them is no number, or everything is -inf.
OFAKERN_LOCAL double log_of(const ExpSum* parts, i64 count) {
  constexpr double kLn2 = 0.6931471805599453;
  bool any = false, shifted = false;
  float power = 0;
  double unit = 0;
  for (i64 i = 0; i < count; ++i) {
    const ExpSum& part = parts[i];
    if (part.sum != part.sum || part.largest == INFINITY) return NAN;
    if (part.largest == kLowest) continue;
    const double log_unit = static_cast<double>(part.shift) + kLn2 * static_cast<double>(part.power);
    shifted = shifted || part.shift != 0;
    power = any ? max_of(power, part.power) : part.power;
    unit = any ? max_of(unit, log_unit) : log_unit;
    any = true;
  }
  if (!any) return NAN;
  double total = 0;
  for (i64 i = 0; i < count; ++i) {
    const ExpSum& part = parts[i];
    if (part.largest == kLowest) continue;
    const double log_unit = static_cast<double>(part.shift) + kLn2 * static_cast<double>(part.power);
    total += part.sum * (shifted ? std::exp(log_unit - unit) : two_to(part.power - power));
  }
  return std::log(total) + (shifted ? unit : kLn2 * static_cast<double>(power));
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

// A complex transform of M = 2^a 3^b 5^c points over as many signals as a vector V (Vec or VecD) has lanes: lane l of
// every vector is signal l, so that no shuffle is needed and a twiddle factor is one number for all.
//
// In place, decimation in frequency: `fill_places` says where the result of a frequency stands.
#pragma once

#include "core/vec_double.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr int kMostFactors = 16;

struct FftPlan {
  i64 size = 0;  // M
  int factors = 0;
  int radix[kMostFactors] = {};
};

OFAKERN_LOCAL FftPlan make_fft_plan(i64 size) {
  FftPlan plan;
  plan.size = size;
  constexpr int kRadices[5] = {8, 4, 2, 5, 3};
  for (const int radix : kRadices)
    for (; size % radix == 0 && size > 1; size /= radix) plan.radix[plan.factors++] = radix;
  return plan;
}

// places[k]: where the result of frequency k stands. A factor's digit of k counts places of what is left of the length.
OFAKERN_LOCAL void fill_places(const FftPlan& plan, std::int32_t* places) {
  i64 known = 1, length = plan.size;
  places[0] = 0;
  for (int f = 0; f < plan.factors; ++f) {
    length /= plan.radix[f];
    for (i64 k = known; k < known * plan.radix[f]; ++k)
      places[k] = places[k - known] + static_cast<std::int32_t>(length);
    known *= plan.radix[f];
  }
}

template <class V>
struct Complex {
  V re, im;
};

template <class V>
OFAKERN_HOT Complex<V> load_complex(const Number<V>* x, i64 k) {
  return {vload(x + 2 * k * Lanes<V>::kCount), vload(x + (2 * k + 1) * Lanes<V>::kCount)};
}
template <class V>
OFAKERN_HOT void store_complex(Number<V>* x, i64 k, Complex<V> z) {
  vstore(x + 2 * k * Lanes<V>::kCount, z.re);
  vstore(x + (2 * k + 1) * Lanes<V>::kCount, z.im);
}
template <class V>
OFAKERN_HOT Complex<V> add(Complex<V> a, Complex<V> b) {
  return {vadd(a.re, b.re), vadd(a.im, b.im)};
}
template <class V>
OFAKERN_HOT Complex<V> sub(Complex<V> a, Complex<V> b) {
  return {vsub(a.re, b.re), vsub(a.im, b.im)};
}
template <class V>
OFAKERN_HOT Complex<V> add_i(Complex<V> a, Complex<V> b) {
  return {vsub(a.re, b.im), vadd(a.im, b.re)};
}  // a + i b
template <class V>
OFAKERN_HOT Complex<V> sub_i(Complex<V> a, Complex<V> b) {
  return {vadd(a.re, b.im), vsub(a.im, b.re)};
}  // a - i b
template <class V>
OFAKERN_HOT V constant(double x) {
  return vset(static_cast<Number<V>>(x));
}
template <class V>
OFAKERN_HOT Complex<V> scale(Complex<V> a, double by) {
  return {vmul(a.re, constant<V>(by)), vmul(a.im, constant<V>(by))};
}
template <class V>
OFAKERN_HOT Complex<V> fma(Complex<V> a, double by, Complex<V> c) {
  return {vfma(a.re, constant<V>(by), c.re), vfma(a.im, constant<V>(by), c.im)};
}
// a * (cosine - i sine)
template <class V>
OFAKERN_HOT Complex<V> rotate(Complex<V> a, Number<V> cosine, Number<V> sine) {
  const V c = vset(cosine), s = vset(sine);
  return {vfma(a.im, s, vmul(a.re, c)), vsub(vmul(a.im, c), vmul(a.re, s))};
}

// z[q] becomes the sum over p of z[p] exp(-2 pi i p q / R).
template <class V>
OFAKERN_HOT void transform(Complex<V> (&z)[2]) {
  const Complex<V> a = z[0];
  z[0] = add(a, z[1]);
  z[1] = sub(a, z[1]);
}

template <class V>
OFAKERN_HOT void transform(Complex<V> (&z)[3]) {
  constexpr double kSine = 0.866025403784438647;
  const Complex<V> both = add(z[1], z[2]), turn = scale(sub(z[1], z[2]), kSine), middle = fma(both, -0.5, z[0]);
  z[0] = add(z[0], both);
  z[1] = sub_i(middle, turn);
  z[2] = add_i(middle, turn);
}

template <class V>
OFAKERN_HOT void transform(Complex<V> (&z)[4]) {
  const Complex<V> a = add(z[0], z[2]), b = sub(z[0], z[2]), c = add(z[1], z[3]), d = sub(z[1], z[3]);
  z[0] = add(a, c);
  z[1] = sub_i(b, d);
  z[2] = sub(a, c);
  z[3] = add_i(b, d);
}

template <class V>
OFAKERN_HOT void transform(Complex<V> (&z)[5]) {
  constexpr double kCos1 = 0.309016994374947424, kCos2 = -0.809016994374947424;
  constexpr double kSin1 = 0.951056516295153572, kSin2 = 0.587785252292473129;
  const Complex<V> a = add(z[1], z[4]), b = add(z[2], z[3]), c = sub(z[1], z[4]), d = sub(z[2], z[3]);
  const Complex<V> one = fma(b, kCos2, fma(a, kCos1, z[0])), two = fma(b, kCos1, fma(a, kCos2, z[0]));
  const Complex<V> turn1 = fma(d, kSin2, scale(c, kSin1)), turn2 = fma(d, -kSin1, scale(c, kSin2));
  z[0] = add(z[0], add(a, b));
  z[1] = sub_i(one, turn1);
  z[2] = sub_i(two, turn2);
  z[3] = add_i(two, turn2);
  z[4] = add_i(one, turn1);
}

template <class V>
OFAKERN_HOT void transform(Complex<V> (&z)[8]) {
  constexpr double kHalf = 0.707106781186547524;
  Complex<V> even[4] = {z[0], z[2], z[4], z[6]}, odd[4] = {z[1], z[3], z[5], z[7]};
  transform(even);
  transform(odd);
  const Complex<V> one = scale<V>({vadd(odd[1].re, odd[1].im), vsub(odd[1].im, odd[1].re)}, kHalf);
  const Complex<V> three = scale<V>({vsub(odd[3].im, odd[3].re), vadd(odd[3].re, odd[3].im)}, kHalf);
  z[0] = add(even[0], odd[0]);
  z[4] = sub(even[0], odd[0]);
  z[1] = add(even[1], one);
  z[5] = sub(even[1], one);
  z[2] = sub_i(even[2], odd[2]);
  z[6] = add_i(even[2], odd[2]);
  // three is -(re + im) in its imaginary part: added and subtracted part by part instead of negated
  z[3] = {vadd(even[3].re, three.re), vsub(even[3].im, three.im)};
  z[7] = {vsub(even[3].re, three.re), vadd(even[3].im, three.im)};
}

// One pass over x: every block of `length` points becomes R blocks. roots: cosine and sine of 2 pi k / (2 size).
template <class V, int R>
OFAKERN_LOCAL void fft_stage(Number<V>* x, i64 size, i64 length, const Number<V>* roots) {
  const i64 part = length / R, step = 2 * (2 * size / length);
  for (i64 j = 0; j < part; ++j)
    for (i64 block = j; block < size; block += length) {
      Complex<V> z[R];
      for (int q = 0; q < R; ++q) z[q] = load_complex<V>(x, block + q * part);
      transform(z);
      store_complex(x, block, z[0]);
      for (int q = 1; q < R; ++q) {
        const Number<V>* root = roots + j * q * step;
        store_complex(x, block + q * part, j == 0 ? z[q] : rotate(z[q], root[0], root[1]));
      }
    }
}

template <class V>
OFAKERN_LOCAL void fft(const FftPlan& plan, Number<V>* x, const Number<V>* roots) {
  i64 length = plan.size;
  for (int f = 0; f < plan.factors; ++f) {
    switch (plan.radix[f]) {
      case 8:
        fft_stage<V, 8>(x, plan.size, length, roots);
        break;
      case 5:
        fft_stage<V, 5>(x, plan.size, length, roots);
        break;
      case 4:
        fft_stage<V, 4>(x, plan.size, length, roots);
        break;
      case 3:
        fft_stage<V, 3>(x, plan.size, length, roots);
        break;
      default:
        fft_stage<V, 2>(x, plan.size, length, roots);
    }
    length /= plan.radix[f];
  }
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

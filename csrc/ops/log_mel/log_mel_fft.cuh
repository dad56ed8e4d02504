// A complex transform of M = 2^a 3^b 5^c points in shared memory, by one warp: as fft.h, in place by decimation in
// frequency, a butterfly to a lane. The result of frequency k stands at place_of(k). N: float or double.
#pragma once

#include "core/simt.h"

namespace ofakern {
namespace {

constexpr int kMostFactors = 16;

struct FftPlan {
  int size, factors;
  int radix[kMostFactors];
};

FftPlan make_fft_plan(int size) {
  FftPlan plan = {size, 0, {}};
  for (const int radix : {8, 4, 2, 5, 3})
    for (; size % radix == 0 && size > 1; size /= radix) plan.radix[plan.factors++] = radix;
  return plan;
}

__device__ __forceinline__ int place_of(const FftPlan& plan, int frequency) {
  int length = plan.size, place = 0;
  for (int f = 0; f < plan.factors; ++f) {
    length /= plan.radix[f];
    place += frequency % plan.radix[f] * length;
    frequency /= plan.radix[f];
  }
  return place;
}

template <class N>
struct alignas(2 * sizeof(N)) Complex {
  N x, y;
};

template <class N>
__device__ __forceinline__ Complex<N> add(Complex<N> a, Complex<N> b) {
  return {a.x + b.x, a.y + b.y};
}
template <class N>
__device__ __forceinline__ Complex<N> sub(Complex<N> a, Complex<N> b) {
  return {a.x - b.x, a.y - b.y};
}
// a + i b
template <class N>
__device__ __forceinline__ Complex<N> add_i(Complex<N> a, Complex<N> b) {
  return {a.x - b.y, a.y + b.x};
}
// a - i b
template <class N>
__device__ __forceinline__ Complex<N> sub_i(Complex<N> a, Complex<N> b) {
  return {a.x + b.y, a.y - b.x};
}
template <class N>
__device__ __forceinline__ Complex<N> scale(Complex<N> a, double by) {
  return {a.x * static_cast<N>(by), a.y * static_cast<N>(by)};
}
// by a + c
template <class N>
__device__ __forceinline__ Complex<N> add_scaled(Complex<N> a, double by, Complex<N> c) {
  return {a.x * static_cast<N>(by) + c.x, a.y * static_cast<N>(by) + c.y};
}
// a * (cosine - i sine)
template <class N>
__device__ __forceinline__ Complex<N> rotate(Complex<N> a, Complex<N> root) {
  return {a.x * root.x + a.y * root.y, a.y * root.x - a.x * root.y};
}

// z[q] becomes the sum over p of z[p] exp(-2 pi i p q / R).
template <class N>
__device__ __forceinline__ void transform(Complex<N> (&z)[2]) {
  const Complex<N> a = z[0];
  z[0] = add(a, z[1]);
  z[1] = sub(a, z[1]);
}

template <class N>
__device__ __forceinline__ void transform(Complex<N> (&z)[3]) {
  constexpr double kSine = 0.866025403784438647;
  const Complex<N> both = add(z[1], z[2]), turn = scale(sub(z[1], z[2]), kSine), middle = add_scaled(both, -0.5, z[0]);
  z[0] = add(z[0], both);
  z[1] = sub_i(middle, turn);
  z[2] = add_i(middle, turn);
}

template <class N>
__device__ __forceinline__ void transform(Complex<N> (&z)[4]) {
  const Complex<N> a = add(z[0], z[2]), b = sub(z[0], z[2]), c = add(z[1], z[3]), d = sub(z[1], z[3]);
  z[0] = add(a, c);
  z[1] = sub_i(b, d);
  z[2] = sub(a, c);
  z[3] = add_i(b, d);
}

template <class N>
__device__ __forceinline__ void transform(Complex<N> (&z)[5]) {
  constexpr double kCos1 = 0.309016994374947424, kCos2 = -0.809016994374947424;
  constexpr double kSin1 = 0.951056516295153572, kSin2 = 0.587785252292473129;
  const Complex<N> a = add(z[1], z[4]), b = add(z[2], z[3]), c = sub(z[1], z[4]), d = sub(z[2], z[3]);
  const Complex<N> one = add_scaled(b, kCos2, add_scaled(a, kCos1, z[0]));
  const Complex<N> two = add_scaled(b, kCos1, add_scaled(a, kCos2, z[0]));
  const Complex<N> turn1 = add_scaled(d, kSin2, scale(c, kSin1)), turn2 = add_scaled(d, -kSin1, scale(c, kSin2));
  z[0] = add(z[0], add(a, b));
  z[1] = sub_i(one, turn1);
  z[2] = sub_i(two, turn2);
  z[3] = add_i(two, turn2);
  z[4] = add_i(one, turn1);
}

template <class N>
__device__ __forceinline__ void transform(Complex<N> (&z)[8]) {
  constexpr double kHalf = 0.707106781186547524;
  Complex<N> even[4] = {z[0], z[2], z[4], z[6]}, odd[4] = {z[1], z[3], z[5], z[7]};
  transform(even);
  transform(odd);
  const Complex<N> one = scale<N>({odd[1].x + odd[1].y, odd[1].y - odd[1].x}, kHalf);
  const Complex<N> three = scale<N>({odd[3].y - odd[3].x, odd[3].x + odd[3].y}, kHalf);
  z[0] = add(even[0], odd[0]);
  z[4] = sub(even[0], odd[0]);
  z[1] = add(even[1], one);
  z[5] = sub(even[1], one);
  z[2] = sub_i(even[2], odd[2]);
  z[6] = add_i(even[2], odd[2]);
  // three is -(x + y) in its imaginary part: added and subtracted part by part instead of negated
  z[3] = {even[3].x + three.x, even[3].y - three.y};
  z[7] = {even[3].x - three.x, even[3].y + three.y};
}

// One pass over z: every run of `length` points becomes R runs. roots: cosine and sine of 2 pi k / (2 size).
template <int R, class N>
__device__ __forceinline__ void fft_stage(Complex<N>* z, int size, int length, const Complex<N>* roots) {
  const int part = length / R, step = 2 * size / length;
  for (int n = simt::lane(); n < size / R; n += 32) {
    const int run = n / part, j = n - run * part, first = run * length + j;
    Complex<N> own[R];
#pragma unroll
    for (int q = 0; q < R; ++q) own[q] = z[first + q * part];
    transform(own);
    z[first] = own[0];
#pragma unroll
    for (int q = 1; q < R; ++q) z[first + q * part] = j == 0 ? own[q] : rotate(own[q], roots[j * q * step]);
  }
  simt::sync_warp();
}

template <class N>
__device__ __forceinline__ void fft(const FftPlan& plan, Complex<N>* z, const Complex<N>* roots) {
  int length = plan.size;
  for (int f = 0; f < plan.factors; ++f) {
    const int radix = plan.radix[f];
    if (radix == 8) fft_stage<8>(z, plan.size, length, roots);
    if (radix == 5) fft_stage<5>(z, plan.size, length, roots);
    if (radix == 4) fft_stage<4>(z, plan.size, length, roots);
    if (radix == 3) fft_stage<3>(z, plan.size, length, roots);
    if (radix == 2) fft_stage<2>(z, plan.size, length, roots);
    length /= radix;
  }
}

}  // namespace
}  // namespace ofakern

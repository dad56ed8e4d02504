// Portable C++: four floats in a plain array, for any machine. See vec.h for the meaning of each operation.
#pragma once

#include <cmath>

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr int kWidth = 4;
using Mask = std::uint32_t;  // bit l is lane l
struct Vec {
  float v[kWidth];
};

#define OFAKERN_LANES for (int l = 0; l < kWidth; ++l)

constexpr float kExp2Floor = -127.0f;  // vexp2 of this and of anything below is 0

OFAKERN_HOT Vec vset(float x) { return {{x, x, x, x}}; }
OFAKERN_HOT Vec vzero() { return vset(0.0f); }
OFAKERN_HOT Vec vload(const float* p) {
  Vec r;
  OFAKERN_LANES r.v[l] = p[l];
  return r;
}
OFAKERN_HOT void vstore(float* p, Vec x) { OFAKERN_LANES p[l] = x.v[l]; }
OFAKERN_HOT Vec vload_masked(const float* p, Mask m) {
  Vec r = vzero();
  OFAKERN_LANES if (m >> l & 1u) r.v[l] = p[l];
  return r;
}
OFAKERN_HOT Vec vload_merge(Vec a, const float* p, Mask m) {  // p where m
  OFAKERN_LANES if (m >> l & 1u) a.v[l] = p[l];
  return a;
}
OFAKERN_HOT void vstore_masked(float* p, Vec x, Mask m) { OFAKERN_LANES if (m >> l & 1u) p[l] = x.v[l]; }
OFAKERN_HOT Vec vgather(const float* base, const std::int32_t* index, Mask m) {
  Vec r = vzero();
  OFAKERN_LANES if (m >> l & 1u) r.v[l] = base[index[l]];
  return r;
}

OFAKERN_HOT Vec vadd(Vec a, Vec b) {
  OFAKERN_LANES a.v[l] += b.v[l];
  return a;
}
OFAKERN_HOT Vec vsub(Vec a, Vec b) {
  OFAKERN_LANES a.v[l] -= b.v[l];
  return a;
}
OFAKERN_HOT Vec vmul(Vec a, Vec b) {
  OFAKERN_LANES a.v[l] *= b.v[l];
  return a;
}
OFAKERN_HOT Vec vfma(Vec a, Vec b, Vec c) {
  OFAKERN_LANES c.v[l] += a.v[l] * b.v[l];
  return c;
}
OFAKERN_HOT Vec vmax(Vec a, Vec b) {  // b where either is NaN
  OFAKERN_LANES a.v[l] = a.v[l] > b.v[l] ? a.v[l] : b.v[l];
  return a;
}
OFAKERN_HOT Vec vmin(Vec a, Vec b) {  // b where either is NaN
  OFAKERN_LANES a.v[l] = a.v[l] < b.v[l] ? a.v[l] : b.v[l];
  return a;
}
OFAKERN_HOT Vec vround(Vec a) {
  OFAKERN_LANES a.v[l] = std::nearbyintf(a.v[l]);
  return a;
}
// a * 2^n for integral n in [-127, 128], where 2^128 is inf; NaN passes through a.
OFAKERN_HOT Vec vscale2(Vec a, Vec n) {
  OFAKERN_LANES {
    const std::int32_t e = n.v[l] == n.v[l] ? static_cast<std::int32_t>(n.v[l]) : 0;
    a.v[l] *= bits_to_float(static_cast<std::uint32_t>(e + 127) << 23);
  }
  return a;
}
OFAKERN_HOT Vec vselect(Mask m, Vec yes, Vec no) {
  OFAKERN_LANES if (m >> l & 1u) no.v[l] = yes.v[l];
  return no;
}
OFAKERN_HOT float hmax(Vec a) {
  float r = a.v[0];
  OFAKERN_LANES r = r > a.v[l] ? r : a.v[l];
  return r;
}
OFAKERN_HOT float hsum(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
OFAKERN_HOT bool vany_above(Vec a, float limit) {  // false for NaN
  bool any = false;
  OFAKERN_LANES any = any || a.v[l] > limit;
  return any;
}

OFAKERN_HOT Mask mask_first(int n) { return n >= kWidth ? 0xfu : n <= 0 ? 0u : (1u << n) - 1u; }
OFAKERN_HOT Mask mask_bits(std::uint32_t bits) { return bits & 0xfu; }
OFAKERN_HOT Mask mask_range(int lo, int hi) { return mask_first(hi) & ~mask_first(lo); }
OFAKERN_HOT Mask mask_and(Mask a, Mask b) { return a & b; }
OFAKERN_HOT Mask mask_or(Mask a, Mask b) { return a | b; }
OFAKERN_HOT Mask mask_andnot(Mask a, Mask b) { return a & ~b; }
OFAKERN_HOT bool mask_none(Mask m) { return m == 0; }

template <class T>
OFAKERN_HOT Vec vload_partial(const T* p, int n) {
  Vec r = vzero();
  for (int l = 0; l < n; ++l) r.v[l] = to_float(p[l]);
  return r;
}
template <class T>
OFAKERN_HOT void vstore_partial(T* p, Vec x, int n) {
  for (int l = 0; l < n; ++l) from_float(x.v[l], p + l);
}
template <class T>
OFAKERN_HOT Vec vload_as(const T* p) {
  return vload_partial(p, kWidth);
}
template <class T>
OFAKERN_HOT void vstore_as(T* p, Vec x) {
  vstore_partial(p, x, kWidth);
}

#undef OFAKERN_LANES

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

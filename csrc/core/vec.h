// One vector type per instruction set, all with the same operations, so that a kernel is written once.
//
// Everything lives in an unnamed namespace inside the ISA's own: code compiled with one ISA's flags can then never be
// linked into another ISA's kernel (a weak symbol could be).
#pragma once

#include <cstdint>
#include <cstring>

#ifndef OFAKERN_ISA
#error "OFAKERN_ISA names the namespace of the instruction set this file is compiled for"
#endif

#if defined(__SANITIZE_ADDRESS__)
// Under sanitizers a forced copy of each checked access would take gcc minutes.
#define OFAKERN_HOT static inline __attribute__((unused))
#else
#define OFAKERN_HOT static inline __attribute__((always_inline, unused))
#endif
#define OFAKERN_LOCAL static __attribute__((unused))

namespace ofakern::OFAKERN_ISA {
namespace {

using i64 = std::int64_t;

// Storage types; arithmetic is done in f32.
struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

template <class T>
OFAKERN_HOT constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
OFAKERN_HOT constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}
OFAKERN_HOT i64 round_up(i64 n, i64 multiple) { return (n + multiple - 1) / multiple * multiple; }
OFAKERN_HOT i64 ceil_div(i64 n, i64 d) { return (n + d - 1) / d; }

OFAKERN_HOT float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
OFAKERN_HOT std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

OFAKERN_HOT float to_float(float x) { return x; }
OFAKERN_HOT float to_float(std::uint8_t x) { return static_cast<float>(x); }
OFAKERN_HOT float to_float(std::int8_t x) { return static_cast<float>(x); }
OFAKERN_HOT float to_float(bf16 x) { return bits_to_float(std::uint32_t{x.bits} << 16); }
OFAKERN_HOT float to_float(f16 x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Multiplying by 2^112 re-biases the exponent and makes subnormals normal, exactly.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000u)));
}

// Round to nearest even; NaN stays a (quiet) NaN.
OFAKERN_HOT void from_float(float x, float* out) { *out = x; }
OFAKERN_HOT void from_float(float x, bf16* out) {
  const std::uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<std::uint16_t>((bits >> 16) | 0x40u);
    return;
  }
  out->bits = static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
OFAKERN_HOT void from_float(float x, f16* out) {
  const std::uint32_t bits = float_to_bits(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to at least 2^16
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal in f16: let the adder round at 2^-24
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(sign | half);
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

#if defined(__AVX512F__)
#include "core/vec_avx512.h"
#elif defined(__AVX2__)
#include "core/vec_avx2.h"
#else
#include "core/vec_scalar.h"
#endif

namespace ofakern::OFAKERN_ISA {
namespace {

#if defined(__AVX512F__)
// 2^(n/32): one instruction looks sixteen lanes up.
alignas(64) constexpr float kPowersOfTwo[32] = {
    1.0f,       1.0218972f, 1.0442737f, 1.0671405f, 1.0905077f, 1.1143868f, 1.1387886f, 1.1637249f,
    1.1892071f, 1.2152474f, 1.2418578f, 1.269051f,  1.2968396f, 1.3252367f, 1.3542556f, 1.38391f,
    1.4142135f, 1.4451808f, 1.4768262f, 1.5091645f, 1.5422108f, 1.5759809f, 1.6104903f, 1.6457555f,
    1.6817929f, 1.7186193f, 1.7562522f, 1.7947091f, 1.8340081f, 1.8741677f, 1.9152066f, 1.9571441f};

// 2^x; inf from 128 on; 0 for -inf. NaN stays NaN. Relative error 1.2e-7, nearly all of it rounding.
//
// x = n + j/32 + f with f in [0, 1/32): a table for 2^(j/32) leaves 2^f - 1 a polynomial of degree 3, half of what f in
// [-1/2, 1/2] takes. Nothing needs clamping: f is 0 for -inf, and scalef by floor(x) makes that lane 0.
OFAKERN_HOT Vec vexp2(Vec x) {
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const Vec f = {_mm512_reduce_ps(x.v, 5 << 4 | kDown)};
  // 1.5 * 2^18: what is added to it keeps five bits behind the point, the lowest of the mantissa.
  const __m512i j = _mm512_castps_si512(_mm512_add_round_ps(x.v, _mm512_set1_ps(393216.0f), kDown));
  const Vec power = {_mm512_permutex2var_ps(_mm512_load_ps(kPowersOfTwo), j, _mm512_load_ps(kPowersOfTwo + 16))};
  Vec p = vset(5.60842119e-2f);
  p = vfma(p, f, vset(2.40216002e-1f));
  p = vfma(p, f, vset(6.93147242e-1f));
  return {_mm512_scalef_ps(vfma(vmul(power, f), p, power).v, x.v)};
}
#else
// 2^f on [-1/2, 1/2]: minimax polynomial of degree 6, relative error 2e-9 before rounding.
OFAKERN_HOT Vec exp2_fraction(Vec f) {
  Vec p = vset(1.5353361960283155e-4f);
  p = vfma(p, f, vset(1.3398874715530545e-3f));
  p = vfma(p, f, vset(9.618437359928136e-3f));
  p = vfma(p, f, vset(5.550332470355497e-2f));
  p = vfma(p, f, vset(2.4022647913587908e-1f));
  p = vfma(p, f, vset(6.931472028554346e-1f));
  return vfma(p, f, vset(1.0f));
}

// 2^x; inf from 127.5 on; 0 for -inf; below -126 the result may be flushed to 0. NaN stays NaN.
OFAKERN_HOT Vec vexp2(Vec x) {
  const Vec clamped = vmin(vset(128.0f), vmax(vset(kExp2Floor), x));
  const Vec n = vround(clamped);
  return vscale2(exp2_fraction(vsub(clamped, n)), n);
}
#endif

// The same to a relative error of 3e-6, for results that are rounded to bf16.
OFAKERN_HOT Vec vexp2_rough(Vec x) {
#if defined(__AVX512F__)
  // x - floor(x) is 0 for -inf, and scalef by floor(x) makes that lane 0: nothing needs clamping.
  const Vec f = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  Vec p = vset(1.3534167551088399e-2f);
  p = vfma(p, f, vset(5.201146386401193e-2f));
  p = vfma(p, f, vset(2.4144275287058664e-1f));
  p = vfma(p, f, vset(6.930038359289532e-1f));
  p = vfma(p, f, vset(1.000002593246219f));
  return {_mm512_scalef_ps(p.v, x.v)};
#else
  return vexp2(x);
#endif
}
// The exponential whose error is below the rounding of Elem.
OFAKERN_HOT Vec vexp2_for(Vec x, const float*) { return vexp2(x); }
OFAKERN_HOT Vec vexp2_for(Vec x, const bf16*) { return vexp2_rough(x); }

// One lane's worth of a masked or whole load of n <= kWidth elements of any storage type, as f32.
template <class T>
OFAKERN_HOT Vec vload_n(const T* p, i64 n) {
  return n >= kWidth ? vload_as(p) : vload_partial(p, static_cast<int>(n));
}
template <class T>
OFAKERN_HOT void vstore_n(T* p, Vec x, i64 n) {
  if (n >= kWidth)
    vstore_as(p, x);
  else
    vstore_partial(p, x, static_cast<int>(n));
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

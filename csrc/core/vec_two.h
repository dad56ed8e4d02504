// Two vectors at a time, where that takes fewer instructions than one after the other, and an exponential that needs no
// clamping.
#pragma once

#include "core/vec.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// vexp2_for, in fewer instructions: where taking off the whole part is one, nothing needs clamping (see vexp2_rough).
template <class Elem>
OFAKERN_HOT Vec vexp2_short_for(Vec x, const Elem* elem) {
  return vexp2_for(x, elem);
}
#if defined(__AVX512F__)
OFAKERN_HOT Vec vexp2_short_for(Vec x, const float*) {
  const Vec f = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  Vec p = vset(2.1702254889532924e-4f);  // minimax on [0, 1], relative error 2e-9 before rounding
  p = vfma(p, f, vset(1.2439688434824347e-3f));
  p = vfma(p, f, vset(9.678840637207031e-3f));
  p = vfma(p, f, vset(5.5483341217041016e-2f));
  p = vfma(p, f, vset(2.4022983014583588e-1f));
  p = vfma(p, f, vset(6.931470036506653e-1f));
  p = vfma(p, f, vset(1.0f));
  return {_mm512_scalef_ps(p.v, x.v)};
}
#endif

// One behind the other.
template <class T>
OFAKERN_HOT void vstore_two(T* p, Vec a, Vec b) {
  vstore_as(p, a);
  vstore_as(p + kWidth, b);
}
#if defined(__AVX512BF16__)
// Rounding two vectors at once takes little more than rounding one.
OFAKERN_HOT __m512i narrow_two(Vec a, Vec b) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)); }
OFAKERN_HOT void vstore_two(bf16* p, Vec a, Vec b) { _mm512_storeu_si512(p, narrow_two(a, b)); }

// Sixteen pairs (even[l], odd[l]) of what narrow_two(even, odd) gave: the operand order of VDPBF16PS and of AMX's B
// tiles.
alignas(64) constexpr std::uint16_t kPairOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
OFAKERN_HOT void store_as_pairs(bf16* p, __m512i both) {
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kPairOrder), both));
}
// Sixteen pairs (even[l], odd[l]), rounded to bf16.
OFAKERN_HOT void vstore_two_as_pairs(bf16* p, Vec even, Vec odd) { store_as_pairs(p, narrow_two(even, odd)); }
// The same, and each vector by itself.
OFAKERN_HOT void vstore_two_as_pairs(bf16* p, bf16* even_row, bf16* odd_row, Vec even, Vec odd) {
  const __m512i both = narrow_two(even, odd);
  store_as_pairs(p, both);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(even_row), _mm512_castsi512_si256(both));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd_row), _mm512_extracti64x4_epi64(both, 1));
}
#endif

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

// Dropout factors of a row. Column d uses word d mod 4 of the Philox4x32-10 counter (d / 4, c1, c2, c3), so any part of
// any row can be made again by itself, on any backend.
#pragma once

#include "core/vec.h"

namespace ofakern::OFAKERN_ISA {
namespace {

struct DropoutKey {
  std::uint64_t key;
  std::uint32_t threshold;  // kept when the word is at least this
  float scale;              // 1 / (1 - p)
};

OFAKERN_HOT DropoutKey dropout_key(const std::int64_t* seed, double p) {
  const double words = p * 4294967296.0 + 0.5;
  return {static_cast<std::uint64_t>(seed[0]) + static_cast<std::uint64_t>(seed[1]) * 0x9E3779B97F4A7C15u,
          static_cast<std::uint32_t>(min_of(words, 4294967295.0)), static_cast<float>(1.0 / (1.0 - p))};
}

// Words are the low halves of 64-bit lanes, one counter per lane: a product of two words is then one instruction, its
// low half is already in place and what stands above a word never matters.
#if defined(__AVX512F__)
using Words = __m512i;
constexpr int kCounters = 8;
OFAKERN_HOT Words words_set(std::uint32_t x) { return _mm512_set1_epi64(x); }
OFAKERN_HOT Words words_from(std::uint32_t x) {
  return _mm512_add_epi64(_mm512_set1_epi64(x), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
}
OFAKERN_HOT Words words_product(Words a, Words b) { return _mm512_mul_epu32(a, b); }
OFAKERN_HOT Words words_high_xor(Words product, Words a, Words b) {
  return _mm512_ternarylogic_epi64(_mm512_srli_epi64(product, 32), a, b, 0x96);
}
OFAKERN_HOT void store_factors(const Words c[4], const DropoutKey& dropout, float* out) {
  const __mmask16 odd = 0xaaaa;
  const __m512i first = _mm512_mask_mov_epi32(c[0], odd, _mm512_slli_epi64(c[1], 32));
  const __m512i second = _mm512_mask_mov_epi32(c[2], odd, _mm512_slli_epi64(c[3], 32));
  const __m512i threshold = _mm512_set1_epi32(static_cast<int>(dropout.threshold));
  const __m512 scale = _mm512_set1_ps(dropout.scale);
  const __m512i low = _mm512_permutex2var_epi64(first, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), second);
  const __m512i high = _mm512_permutex2var_epi64(first, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), second);
  _mm512_storeu_ps(out, _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(low, threshold), scale));
  _mm512_storeu_ps(out + 16, _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(high, threshold), scale));
}
#elif defined(__AVX2__)
using Words = __m256i;
constexpr int kCounters = 4;
OFAKERN_HOT Words words_set(std::uint32_t x) { return _mm256_set1_epi64x(x); }
OFAKERN_HOT Words words_from(std::uint32_t x) {
  return _mm256_add_epi64(_mm256_set1_epi64x(x), _mm256_setr_epi64x(0, 1, 2, 3));
}
OFAKERN_HOT Words words_product(Words a, Words b) { return _mm256_mul_epu32(a, b); }
OFAKERN_HOT Words words_high_xor(Words product, Words a, Words b) {
  return _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product, 32), a), b);
}
OFAKERN_HOT void store_factors(const Words c[4], const DropoutKey& dropout, float* out) {
  const __m256i first = _mm256_blend_epi32(c[0], _mm256_slli_epi64(c[1], 32), 0xaa);
  const __m256i second = _mm256_blend_epi32(c[2], _mm256_slli_epi64(c[3], 32), 0xaa);
  const __m256i threshold = _mm256_set1_epi32(static_cast<int>(dropout.threshold));
  const __m256 scale = _mm256_set1_ps(dropout.scale);
  const __m256i even = _mm256_unpacklo_epi64(first, second), odd = _mm256_unpackhi_epi64(first, second);
  const __m256i parts[2] = {_mm256_permute2x128_si256(even, odd, 0x20), _mm256_permute2x128_si256(even, odd, 0x31)};
  for (int p = 0; p < 2; ++p) {
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_max_epu32(parts[p], threshold), parts[p]);
    _mm256_storeu_ps(out + 8 * p, _mm256_and_ps(_mm256_castsi256_ps(kept), scale));
  }
}
#else
using Words = std::uint64_t;
constexpr int kCounters = 1;
OFAKERN_HOT Words words_set(std::uint32_t x) { return x; }
OFAKERN_HOT Words words_from(std::uint32_t x) { return x; }
OFAKERN_HOT Words words_product(Words a, Words b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
OFAKERN_HOT Words words_high_xor(Words product, Words a, Words b) { return (product >> 32) ^ a ^ b; }
OFAKERN_HOT void store_factors(const Words c[4], const DropoutKey& dropout, float* out) {
  for (int w = 0; w < 4; ++w) out[w] = static_cast<std::uint32_t>(c[w]) >= dropout.threshold ? dropout.scale : 0.0f;
}
#endif

constexpr i64 kDropoutColumns = 32;  // a row of factors is written in whole groups of this many columns
static_assert(kDropoutColumns % (4 * kCounters) == 0, "every instruction set writes whole groups");

// out[0, count rounded up to kDropoutColumns) = 0 or scale.
OFAKERN_LOCAL void dropout_row(const DropoutKey& dropout, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3,
                               i64 count, float* out) {
  const Words first_factor = words_set(0xD2511F53u), second_factor = words_set(0xCD9E8D57u);
  for (i64 column = 0; column < round_up(count, kDropoutColumns); column += 4 * kCounters) {
    Words c[4] = {words_from(static_cast<std::uint32_t>(column / 4)), words_set(c1), words_set(c2), words_set(c3)};
    std::uint32_t key0 = static_cast<std::uint32_t>(dropout.key), key1 = static_cast<std::uint32_t>(dropout.key >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Words a = words_product(c[0], first_factor), b = words_product(c[2], second_factor);
      c[0] = words_high_xor(b, c[1], words_set(key0));
      c[1] = b;
      c[2] = words_high_xor(a, c[3], words_set(key1));
      c[3] = a;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    store_factors(c, dropout, out + column);
  }
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

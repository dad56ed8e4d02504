// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), many counters side by side.
#pragma once

#include "core/vec.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ofakern::OFAKERN_ISA {
namespace {

// 64-bit lanes that hold 32-bit words in their low halves: a product of two words fits, and what stands in the high
// halves is never read by the next product.
#if defined(__AVX512F__)
struct WordLanes {
  static constexpr int kCount = 8;
  __m512i x;
};
OFAKERN_HOT WordLanes all_lanes(std::uint32_t word) { return {_mm512_set1_epi64(word)}; }
// (first + n) & mask, in an order that store_words undoes.
OFAKERN_HOT WordLanes counters(std::uint32_t first, std::uint32_t mask) {
  const __m512i n = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  return {_mm512_and_si512(_mm512_add_epi64(_mm512_set1_epi64(first), n), _mm512_set1_epi64(mask))};
}
OFAKERN_HOT WordLanes product(WordLanes a, WordLanes b) { return {_mm512_mul_epu32(a.x, b.x)}; }
OFAKERN_HOT WordLanes high_word(WordLanes a) { return {_mm512_srli_epi64(a.x, 32)}; }
OFAKERN_HOT WordLanes exclusive_or(WordLanes a, WordLanes b) { return {_mm512_xor_si512(a.x, b.x)}; }
// The four words of every counter, one counter after another.
OFAKERN_HOT void store_words(std::uint32_t* out, const WordLanes c[4]) {
  const __m512i low = _mm512_mask_blend_epi32(0xAAAA, c[0].x, _mm512_slli_epi64(c[1].x, 32));
  const __m512i high = _mm512_mask_blend_epi32(0xAAAA, c[2].x, _mm512_slli_epi64(c[3].x, 32));
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low, high));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(low, high));
}
#elif defined(__AVX2__)
struct WordLanes {
  static constexpr int kCount = 4;
  __m256i x;
};
OFAKERN_HOT WordLanes all_lanes(std::uint32_t word) { return {_mm256_set1_epi64x(word)}; }
OFAKERN_HOT WordLanes counters(std::uint32_t first, std::uint32_t mask) {
  const __m256i n = _mm256_setr_epi64x(0, 2, 1, 3);
  return {_mm256_and_si256(_mm256_add_epi64(_mm256_set1_epi64x(first), n), _mm256_set1_epi64x(mask))};
}
OFAKERN_HOT WordLanes product(WordLanes a, WordLanes b) { return {_mm256_mul_epu32(a.x, b.x)}; }
OFAKERN_HOT WordLanes high_word(WordLanes a) { return {_mm256_srli_epi64(a.x, 32)}; }
OFAKERN_HOT WordLanes exclusive_or(WordLanes a, WordLanes b) { return {_mm256_xor_si256(a.x, b.x)}; }
OFAKERN_HOT void store_words(std::uint32_t* out, const WordLanes c[4]) {
  const __m256i low = _mm256_blend_epi32(c[0].x, _mm256_slli_epi64(c[1].x, 32), 0xAA);
  const __m256i high = _mm256_blend_epi32(c[2].x, _mm256_slli_epi64(c[3].x, 32), 0xAA);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(low, high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_unpackhi_epi64(low, high));
}
#else
struct WordLanes {
  static constexpr int kCount = 1;
  std::uint64_t x;
};
OFAKERN_HOT WordLanes all_lanes(std::uint32_t word) { return {word}; }
OFAKERN_HOT WordLanes counters(std::uint32_t first, std::uint32_t mask) { return {first & mask}; }
OFAKERN_HOT WordLanes product(WordLanes a, WordLanes b) { return {(a.x & 0xFFFFFFFFu) * (b.x & 0xFFFFFFFFu)}; }
OFAKERN_HOT WordLanes high_word(WordLanes a) { return {a.x >> 32}; }
OFAKERN_HOT WordLanes exclusive_or(WordLanes a, WordLanes b) { return {a.x ^ b.x}; }
OFAKERN_HOT void store_words(std::uint32_t* out, const WordLanes c[4]) {
  for (int w = 0; w < 4; ++w) out[w] = static_cast<std::uint32_t>(c[w].x);
}
#endif

// One vector at a time: calls are independent, so the processor overlaps them by itself, and with more of them here
// compilers keep the words in memory between the rounds.
constexpr int kPhiloxCounters = WordLanes::kCount;

// out[4 * n + w]: word w of the counter ((first + n) & mask, c1, c2, c3), for kPhiloxCounters values of n.
OFAKERN_HOT void philox(std::uint32_t* out, std::uint32_t first, std::uint32_t mask, std::uint32_t c1, std::uint32_t c2,
                        std::uint32_t c3, std::uint64_t seed) {
  const WordLanes multiplier0 = all_lanes(0xD2511F53u), multiplier1 = all_lanes(0xCD9E8D57u);
  WordLanes c[4] = {counters(first, mask), all_lanes(c1), all_lanes(c2), all_lanes(c3)};
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const WordLanes a = product(multiplier0, c[0]), b = product(multiplier1, c[2]);
    c[0] = exclusive_or(exclusive_or(high_word(b), c[1]), all_lanes(key0));
    c[1] = b;
    c[2] = exclusive_or(exclusive_or(high_word(a), c[3]), all_lanes(key1));
    c[3] = a;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  store_words(out, c);
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

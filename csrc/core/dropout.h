// Dropout factors of a row. Column d uses word d mod 4 of the Philox4x32-10 counter (d / 4, c1, c2, c3), so any part of
// any row can be made again by itself, on any backend.
#pragma once

#include "core/philox.h"

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

constexpr i64 kDropoutColumns = 128;  // a row of factors is written in whole groups of this many columns
static_assert(kDropoutColumns % (4 * kPhiloxCounters) == 0, "every instruction set writes whole groups");

// out[0, count rounded up to kDropoutColumns) = 0 or scale.
OFAKERN_LOCAL void dropout_row(const DropoutKey& dropout, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3,
                               i64 count, float* out) {
  constexpr int kGroup = 4 * kPhiloxCounters;
  const std::uint32_t threshold = dropout.threshold;  // copies: out could be where `dropout` is, for all compilers know
  const float scale = dropout.scale;
  std::uint32_t words[kGroup];
  for (i64 column = 0; column < round_up(count, kDropoutColumns); column += kGroup) {
    philox(words, static_cast<std::uint32_t>(column / 4), 0xFFFFFFFFu, c1, c2, c3, dropout.key);
    for (int n = 0; n < kGroup; ++n) out[column + n] = words[n] >= threshold ? scale : 0.0f;
  }
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

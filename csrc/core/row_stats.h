// Mean and spread of one row: what every LayerNorm begins with. Compiled once per instruction set.
#pragma once

#include "core/vec.h"

namespace ofakern::OFAKERN_ISA {
namespace {

struct RowStats {
  float mean, rstd;  // rstd: 1 / sqrt(variance + eps)
};

// Of z[0, width) with this mean: the variance is that of the centred values.
OFAKERN_LOCAL RowStats row_stats_about(float mean, const float* z, i64 width, float eps) {
  const Vec centre = vset(mean);
  Vec square[2] = {vzero(), vzero()};
  i64 x = 0;
  for (; x + 2 * kWidth <= width; x += 2 * kWidth) {
    const Vec a = vsub(vload(z + x), centre), b = vsub(vload(z + x + kWidth), centre);
    square[0] = vfma(a, a, square[0]);
    square[1] = vfma(b, b, square[1]);
  }
  for (; x < width; x += kWidth) {
    const Vec a =
        vselect(mask_first(static_cast<int>(min_of<i64>(width - x, kWidth))), vsub(vload(z + x), centre), vzero());
    square[0] = vfma(a, a, square[0]);
  }
  const float variance = hsum(vadd(square[0], square[1])) / static_cast<float>(width);
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

// Of z[0, width), whose pad up to a whole vector holds 0. Two passes over the row in the L1 cache.
OFAKERN_LOCAL RowStats row_stats(const float* z, i64 width, float eps) {
  Vec sum[2] = {vzero(), vzero()};
  const i64 padded = round_up(width, kWidth);
  i64 x = 0;
  for (; x + 2 * kWidth <= padded; x += 2 * kWidth) {
    sum[0] = vadd(sum[0], vload(z + x));
    sum[1] = vadd(sum[1], vload(z + x + kWidth));
  }
  if (x < padded) sum[0] = vadd(sum[0], vload(z + x));
  return row_stats_about(hsum(vadd(sum[0], sum[1])) / static_cast<float>(width), z, width, eps);
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

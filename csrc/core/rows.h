// Rows of a matrix shared out to threads, and sums over all rows in an order that the number of rows alone fixes.
// Compiled once per instruction set.
#pragma once

#include "core/parallel.h"
#include "core/vec.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr i64 kMaxChunks = 64;  // partial sums of a backward pass
constexpr i64 kMinChunkRows = 16;
constexpr i64 kTaskElements = 1 << 15;

OFAKERN_HOT i64 rows_per_chunk(i64 rows) { return max_of(kMinChunkRows, ceil_div(rows, kMaxChunks)); }
OFAKERN_HOT i64 chunks_of(i64 rows) { return ceil_div(rows, rows_per_chunk(rows)); }

// Calls body(x, n) for whole vectors (n == kWidth) and then for the tail (n < kWidth).
template <class Body>
OFAKERN_HOT void for_lanes(i64 width, const Body& body) {
  i64 x = 0;
  for (; x + kWidth <= width; x += kWidth) body(x, i64{kWidth});
  if (x < width) body(x, width - x);
}

// target[0, count) = the chunks' partials at `offset`, added in the chunks' order.
OFAKERN_LOCAL void add_partials(const float* partials, i64 chunks, i64 stride, i64 offset, i64 count, float* target,
                                int threads) {
  constexpr i64 kColumns = 256;
  parallel_for(ceil_div(count, kColumns), threads, [&](i64 task, int) {
    const i64 end = min_of(count, (task + 1) * kColumns);
    for (i64 x = task * kColumns; x < end; x += kWidth) {
      const i64 n = min_of<i64>(kWidth, end - x);
      Vec total = vzero();
      for (i64 c = 0; c < chunks; ++c) total = vadd(total, vload_n(partials + c * stride + offset + x, n));
      vstore_n(target + x, total, n);
    }
  });
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

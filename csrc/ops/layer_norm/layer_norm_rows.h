// One row of a fused LayerNorm, forward and backward, and how rows are shared out. Compiled once per instruction set.
//
// A `Source` says where a row's z comes from and what becomes of its gradient, a vector at a time: columns [x, x + n),
// n < kWidth only at a row's end. `spare` (D floats) is the source's own from one call for a row to the next.
//
//   void begin(i64 row, float* spare)                                before a row
//   Vec z<BACKWARD>(i64 row, i64 x, i64 n, float* spare)             0 in lanes beyond n
//   void store(i64 row, i64 x, i64 n, Vec dz, float* spare)
//   void end(i64 row, const float* spare, float* sums)               after a row; sums: the chunk's own partial sums
//   i64 own_sums()                                                   how many floats of them, beyond dweight and dbias
//
// Row buffers are padded to whole vectors.
#pragma once

#include "core/row_stats.h"
#include "core/rows.h"
#include "core/vec_stream.h"
#include "ops/layer_norm/layer_norm.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr i64 kRowBuffers = 2;  // per thread: z or xhat; the source's spare

OFAKERN_HOT i64 padded_width(i64 width) { return round_up(width, 128); }  // whole groups of dropout factors
OFAKERN_HOT i64 row_buffer_floats(i64 width, int threads) { return threads * kRowBuffers * padded_width(width); }

template <class T>
struct ForwardRows {
  i64 rows, width;
  const float *weight, *bias;
  float eps;
  T* out;
  float* stats;
  float* buffers;
  bool stream;
};

template <class T>
OFAKERN_LOCAL ForwardRows<T> forward_rows(i64 rows, const LayerNormAffine& affine, const TensorView& out,
                                          const TensorView& stats, const TensorView& workspace) {
  const i64 width = affine.weight.shape[0];
  T* const data = out.as<T>();
  return {rows,
          width,
          affine.weight.as<const float>(),
          affine.bias.as<const float>(),
          static_cast<float>(affine.eps),
          data,
          stats.as<float>(),
          workspace.as<float>(),
          should_stream(data, width, rows * width * static_cast<i64>(sizeof(T)))};
}

template <class T>
OFAKERN_LOCAL void normalise_row(const ForwardRows<T>& p, const float* z, RowStats row, T* out) {
  const Vec mean = vset(row.mean), rstd = vset(row.rstd);
  for_lanes(p.width, [&](i64 x, i64 n) {
    const Vec xhat = vmul(vsub(vload(z + x), mean), rstd);
    vstore_out(out + x, vfma(xhat, vload_n(p.weight + x, n), vload_n(p.bias + x, n)), n, p.stream);
  });
}

// z, added up while it is made: in two sums, so that adds do not wait for each other, and in row_stats' order.
template <class Source>
OFAKERN_LOCAL RowStats forward_row(const Source& source, i64 row, i64 width, float eps, float* z, float* spare) {
  source.begin(row, spare);
  const auto make = [&](i64 x, i64 n) {
    const Vec value = source.template z<false>(row, x, n, spare);
    vstore(z + x, value);
    return value;
  };
  Vec even = vzero(), odd = vzero();
  i64 x = 0;
  for (; x + 2 * kWidth <= width; x += 2 * kWidth) {
    even = vadd(even, make(x, kWidth));
    odd = vadd(odd, make(x + kWidth, kWidth));
  }
  if (x < width) even = vadd(even, make(x, min_of<i64>(kWidth, width - x)));
  if (x + kWidth < width) odd = vadd(odd, make(x + kWidth, width - x - kWidth));
  return row_stats_about(hsum(vadd(even, odd)) / static_cast<float>(width), z, width, eps);
}

template <class T, class Source>
OFAKERN_LOCAL void layer_norm_forward(const ForwardRows<T>& p, const Source& source, int threads) {
  const i64 padded = padded_width(p.width);
  const i64 rows_per_task = max_of<i64>(1, kTaskElements / max_of<i64>(1, p.width));
  parallel_for(ceil_div(p.rows, rows_per_task), threads, [&](i64 task, int thread) {
    float* const z = p.buffers + thread * kRowBuffers * padded;
    const i64 end = min_of(p.rows, (task + 1) * rows_per_task);
    for (i64 row = task * rows_per_task; row < end; ++row) {
      const RowStats stats = forward_row(source, row, p.width, p.eps, z, z + padded);
      p.stats[2 * row] = stats.mean;
      p.stats[2 * row + 1] = stats.rstd;
      normalise_row(p, z, stats, p.out + row * p.width);
    }
    stream_fence();
  });
}

template <class T>
struct BackwardRows {
  i64 rows, width;
  const T* dout;
  const float* stats;
  const float* weight;
  float *dweight, *dbias;
  float *buffers, *partials;  // partials: [chunks, 2 * width + own sums]
};

template <class T>
OFAKERN_LOCAL BackwardRows<T> backward_rows(const TensorView& dout, const TensorView& stats,
                                            const LayerNormAffine& affine, const AffineGradients& gradients,
                                            const TensorView& workspace, int threads) {
  const i64 width = affine.weight.shape[0];
  float* const buffers = workspace.as<float>();
  return {stats.shape[0],
          width,
          dout.as<const T>(),
          stats.as<const float>(),
          affine.weight.as<const float>(),
          gradients.dweight.as<float>(),
          gradients.dbias.as<float>(),
          buffers,
          buffers + row_buffer_floats(width, threads)};
}

// One row's gradient goes to the source; dweight and dbias grow by the row's part. normalised, spare: a row each. A
// second product with the weight, not a third row of the cache, gives the gradient of xhat again.
template <class T, class Source>
OFAKERN_LOCAL void backward_row(const BackwardRows<T>& p, const Source& source, i64 row, float* normalised,
                                float* spare, float* dweight, float* dbias) {
  const T* const dout = p.dout + row * p.width;
  const Vec mean = vset(p.stats[2 * row]), rstd = vset(p.stats[2 * row + 1]);
  Vec sum = vzero(), dot = vzero();
  for_lanes(p.width, [&](i64 x, i64 n) {
    __builtin_prefetch(dout + p.width + x);
    const Vec incoming = vload_n(dout + x, n);
    const Vec xhat = vmul(vsub(source.template z<true>(row, x, n, spare), mean), rstd);
    const Vec g = vmul(incoming, vload_n(p.weight + x, n));  // 0 in pads, which silences xhat's pads
    sum = vadd(sum, g);
    dot = vfma(g, xhat, dot);
    vstore(normalised + x, xhat);
    vstore(dweight + x, vfma(incoming, xhat, vload(dweight + x)));
    vstore(dbias + x, vadd(vload(dbias + x), incoming));
  });
  const float scale = 1.0f / static_cast<float>(p.width);
  const Vec mean_g = vset(hsum(sum) * scale), mean_dot = vset(hsum(dot) * scale);
  for_lanes(p.width, [&](i64 x, i64 n) {
    const Vec g = vmul(vload_n(dout + x, n), vload_n(p.weight + x, n));
    const Vec centred = vsub(vsub(g, mean_g), vmul(vload(normalised + x), mean_dot));
    source.store(row, x, n, vmul(centred, rstd), spare);
  });
}

OFAKERN_HOT i64 partial_stride(i64 width, i64 own) { return 2 * padded_width(width) + round_up(own, 16); }

template <class T, class Source>
OFAKERN_LOCAL void layer_norm_backward(const BackwardRows<T>& p, const Source& source, float* own_sums, int threads) {
  const i64 padded = padded_width(p.width), own = source.own_sums(), stride = partial_stride(p.width, own);
  const i64 chunk_rows = rows_per_chunk(p.rows), chunks = chunks_of(p.rows);
  parallel_for(chunks, threads, [&](i64 chunk, int thread) {
    float* const z = p.buffers + thread * kRowBuffers * padded;
    float* const spare = z + padded;
    float* const sums = p.partials + chunk * stride;
    std::memset(sums, 0, static_cast<std::size_t>(stride) * sizeof(float));
    const i64 end = min_of(p.rows, (chunk + 1) * chunk_rows);
    for (i64 row = chunk * chunk_rows; row < end; ++row) {
      source.begin(row, spare);
      backward_row(p, source, row, z, spare, sums, sums + padded);
      source.end(row, spare, sums + 2 * padded);
    }
    stream_fence();
  });
  add_partials(p.partials, chunks, stride, 0, p.width, p.dweight, threads);
  add_partials(p.partials, chunks, stride, padded, p.width, p.dbias, threads);
  if (own > 0) add_partials(p.partials, chunks, stride, 2 * padded, own, own_sums, threads);
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

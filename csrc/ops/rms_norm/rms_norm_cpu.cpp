// Two passes over a row, the second of which finds it in L1. Compiled once per instruction set; see core/isa.h.
#include "core/rows.h"
#include "core/vec_stream.h"
#include "core/with_type.h"
#include "ops/rms_norm/rms_norm.h"

namespace ofakern::OFAKERN_ISA {
namespace {

OFAKERN_HOT i64 partial_stride(i64 width) { return round_up(width, 16); }

// sum of term(x, n) over a row in four chains, so that the adds do not wait for each other.
template <class Term>
OFAKERN_HOT float row_sum(i64 width, const Term& term) {
  Vec sum[4] = {vzero(), vzero(), vzero(), vzero()};
  i64 x = 0;
  for (; x + 4 * kWidth <= width; x += 4 * kWidth)
    for (int c = 0; c < 4; ++c) sum[c] = term(x + c * kWidth, i64{kWidth}, sum[c]);
  for (int c = 0; x < width; x += kWidth, ++c) sum[c] = term(x, min_of<i64>(kWidth, width - x), sum[c]);
  return hsum(vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3])));
}

template <class T>
OFAKERN_LOCAL void forward_row(const T* x, const float* weight, i64 width, float rstd, T* out, bool stream) {
  const Vec scale = vset(rstd);
  for_lanes(width, [&](i64 i, i64 n) {
    vstore_out(out + i, vmul(vmul(vload_n(x + i, n), scale), vload_n(weight + i, n)), n, stream);
  });
}

// dx of a row; dweight grows by the row's part.
template <class T>
OFAKERN_LOCAL void backward_row(const T* dout, const T* x, const float* weight, i64 width, float rstd, T* dx,
                                float* dweight, bool stream) {
  const float dot = row_sum(width, [&](i64 i, i64 n, Vec sum) {
    return vfma(vmul(vload_n(dout + i, n), vload_n(weight + i, n)), vload_n(x + i, n), sum);
  });
  // dx = rstd * g - x * (rstd^3 * mean(g * x))
  const Vec scale = vset(rstd), pull = vset(-rstd * rstd * rstd * dot / static_cast<float>(width));
  for_lanes(width, [&](i64 i, i64 n) {
    const Vec incoming = vload_n(dout + i, n), value = vload_n(x + i, n);
    const Vec g = vmul(incoming, vload_n(weight + i, n));
    vstore_out(dx + i, vfma(value, pull, vmul(g, scale)), n, stream);
    vstore_n(dweight + i, vfma(incoming, vmul(value, scale), vload_n(dweight + i, n)), n);
  });
}

template <class T>
OFAKERN_LOCAL bool streams(T* base, i64 rows, i64 width) {
  return should_stream(base, width, rows * width * static_cast<i64>(sizeof(T)));
}

template <class T>
OFAKERN_LOCAL void forward_rows(const T* x, const float* weight, float eps, i64 rows, i64 width, T* out, float* rstd,
                                int threads) {
  const i64 rows_per_task = max_of<i64>(1, kTaskElements / width);
  const bool stream = streams(out, rows, width);
  parallel_for(ceil_div(rows, rows_per_task), threads, [&](i64 task, int) {
    const i64 end = min_of(rows, (task + 1) * rows_per_task);
    for (i64 row = task * rows_per_task; row < end; ++row) {
      const T* const from = x + row * width;
      const float squares = row_sum(width, [&](i64 i, i64 n, Vec sum) {
        const Vec value = vload_n(from + i, n);
        return vfma(value, value, sum);
      });
      rstd[row] = 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + eps);
      forward_row(from, weight, width, rstd[row], out + row * width, stream);
    }
    stream_fence();
  });
}

template <class T>
OFAKERN_LOCAL void backward_rows(const T* dout, const T* x, const float* rstd, const float* weight, i64 rows, i64 width,
                                 T* dx, float* dweight, float* partials, int threads) {
  const i64 stride = partial_stride(width), chunk_rows = rows_per_chunk(rows), chunks = chunks_of(rows);
  const bool stream = streams(dx, rows, width);
  parallel_for(chunks, threads, [&](i64 chunk, int) {
    float* const sums = partials + chunk * stride;
    std::memset(sums, 0, static_cast<std::size_t>(stride) * sizeof(float));
    const i64 end = min_of(rows, (chunk + 1) * chunk_rows);
    for (i64 row = chunk * chunk_rows; row < end; ++row)
      backward_row(dout + row * width, x + row * width, weight, width, rstd[row], dx + row * width, sums, stream);
    stream_fence();
  });
  add_partials(partials, chunks, stride, 0, width, dweight, threads);
}

}  // namespace

i64 rms_norm_backward_workspace(i64 rows, i64 width) {
  return chunks_of(rows) * partial_stride(width) * static_cast<i64>(sizeof(float));
}

void rms_norm_forward(const TensorView& x, const TensorView& weight, double eps, const TensorView& out,
                      const TensorView& rstd, int threads) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    forward_rows(x.as<const T>(), weight.as<const float>(), static_cast<float>(eps), rstd.numel(), weight.shape[0],
                 out.as<T>(), rstd.as<float>(), threads);
  });
}

void rms_norm_backward(const TensorView& dout, const TensorView& x, const TensorView& rstd, const TensorView& weight,
                       const TensorView& dx, const TensorView& dweight, const TensorView& workspace, int threads) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    backward_rows(dout.as<const T>(), x.as<const T>(), rstd.as<const float>(), weight.as<const float>(), rstd.numel(),
                  weight.shape[0], dx.as<T>(), dweight.as<float>(), workspace.as<float>(), threads);
  });
}

}  // namespace ofakern::OFAKERN_ISA

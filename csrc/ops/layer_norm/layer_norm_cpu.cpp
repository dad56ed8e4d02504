// Residual, GELU and head scale before LayerNorm. Compiled once per instruction set; see core/isa.h.
#include "core/dropout.h"
#include "core/vec_gelu.h"
#include "core/with_type.h"
#include "ops/layer_norm/layer_norm_rows.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr std::uint32_t kRowStream = 0xFFFFFFFFu;  // fourth word of the counter: attention's is a sample's number

// x rounded to T, as f32.
OFAKERN_HOT Vec round_as(Vec x, const float*) { return x; }
template <class T>
OFAKERN_HOT Vec round_as(Vec x, const T*) {
  T stored[kWidth];
  vstore_as(stored, x);
  return vload_as(stored);
}

template <class T>
struct AddForward {
  i64 width;
  const T *x, *residual;
  T* total;
  DropoutKey dropout;
  bool drops, stream;

  OFAKERN_ALWAYS_INLINE void begin(i64 row, float* keep) const {
    if (drops) dropout_row(dropout, static_cast<std::uint32_t>(row), 0, kRowStream, width, keep);
  }
  template <bool BACKWARD>
  OFAKERN_ALWAYS_INLINE Vec z(i64 row, i64 i, i64 n, const float* keep) const {
    const i64 at = row * width + i;
    const Vec branch = vload_n(x + at, n), kept = drops ? vmul(branch, vload(keep + i)) : branch;
    const Vec value = round_as(vadd(vload_n(residual + at, n), kept), x);
    vstore_out(total + at, value, n, stream);
    return value;
  }
};

template <class T>
struct AddBackward {
  i64 width;
  const T *total, *dtotal;
  T *dx, *dresidual;
  DropoutKey dropout;
  bool drops, stream;

  OFAKERN_ALWAYS_INLINE i64 own_sums() const { return 0; }
  OFAKERN_ALWAYS_INLINE void begin(i64 row, float* keep) const {
    if (drops) dropout_row(dropout, static_cast<std::uint32_t>(row), 0, kRowStream, width, keep);
  }
  template <bool BACKWARD>
  OFAKERN_ALWAYS_INLINE Vec z(i64 row, i64 i, i64 n, const float*) const {
    return vload_n(total + row * width + i, n);
  }
  OFAKERN_ALWAYS_INLINE void store(i64 row, i64 i, i64 n, Vec dz, const float* keep) const {
    const i64 at = row * width + i;
    const Vec gradient = dtotal == nullptr ? dz : vadd(dz, vload_n(dtotal + at, n));
    vstore_out(dresidual + at, gradient, n, stream);
    if (drops) vstore_out(dx + at, vmul(gradient, vload(keep + i)), n, stream);
  }
  OFAKERN_ALWAYS_INLINE void end(i64, const float*, float*) const {}
};

template <class T>
struct Gelu {
  i64 width;
  const T* x;
  T* dx = nullptr;
  bool stream = false;

  OFAKERN_ALWAYS_INLINE i64 own_sums() const { return 0; }
  OFAKERN_ALWAYS_INLINE void begin(i64, float*) const {}
  template <bool BACKWARD>
  OFAKERN_ALWAYS_INLINE Vec z(i64 row, i64 i, i64 n, float* slope) const {
    const T* const here = x + row * width + i;
    // So much arithmetic hides the memory only when the next row is already on its way.
    __builtin_prefetch(here + width);
    const Vec value = vload_n(here, n);
    if (!BACKWARD) return vgelu(value);
    const GeluLanes gelu = vgelu_with_slope(value);
    vstore(slope + i, gelu.slope);
    return gelu.value;
  }
  OFAKERN_ALWAYS_INLINE void store(i64 row, i64 i, i64 n, Vec dz, const float* slope) const {
    vstore_out(dx + row * width + i, vmul(dz, vload(slope + i)), n, stream);
  }
  OFAKERN_ALWAYS_INLINE void end(i64, const float*, float*) const {}
};

template <class T>
struct HeadScale {
  i64 heads, head_width;
  const T* x;
  const float* scale;
  T* dx = nullptr;

  OFAKERN_ALWAYS_INLINE i64 own_sums() const { return heads; }
  // Heads may begin in the midst of a vector: the spare row holds z whole, and then its gradient.
  OFAKERN_ALWAYS_INLINE void begin(i64 row, float* scaled) const {
    const i64 width = heads * head_width;
    for (i64 h = 0; h < heads; ++h) {
      const Vec factor = vset(scale[h]);
      const T* const from = x + row * width + h * head_width;
      for_lanes(head_width,
                [&](i64 i, i64 n) { vstore_n(scaled + h * head_width + i, vmul(factor, vload_n(from + i, n)), n); });
    }
    for (i64 i = width; i % kWidth != 0; ++i) scaled[i] = 0.0f;
  }
  template <bool BACKWARD>
  OFAKERN_ALWAYS_INLINE Vec z(i64, i64 i, i64, const float* scaled) const {
    return vload(scaled + i);
  }
  OFAKERN_ALWAYS_INLINE void store(i64, i64 i, i64, Vec dz, float* gradient) const { vstore(gradient + i, dz); }
  OFAKERN_ALWAYS_INLINE void end(i64 row, const float* gradient, float* sums) const {
    for (i64 h = 0; h < heads; ++h) {
      const Vec factor = vset(scale[h]);
      const i64 start = (row * heads + h) * head_width;
      Vec sum = vzero();
      for_lanes(head_width, [&](i64 i, i64 n) {
        const Vec dz = vload_n(gradient + h * head_width + i, n);
        sum = vfma(dz, vload_n(x + start + i, n), sum);
        vstore_n(dx + start + i, vmul(factor, dz), n);
      });
      sums[h] += hsum(sum);
    }
  }
};

OFAKERN_HOT DropoutKey key_of(const Dropout& dropout) {
  return dropout.p > 0 ? dropout_key(dropout.seed.as<const std::int64_t>(), dropout.p) : DropoutKey{};
}

template <class T>
OFAKERN_HOT bool streams(const TensorView& target, i64 width) {
  const T* const base = target.as<const T>();
  return should_stream(base, width, target.numel() * static_cast<i64>(sizeof(T)));
}

}  // namespace

i64 layer_norm_forward_workspace(i64 width, int threads) {
  return row_buffer_floats(width, threads) * static_cast<i64>(sizeof(float));
}

i64 layer_norm_backward_workspace(i64 rows, i64 width, i64 heads, int threads) {
  const i64 partials = chunks_of(rows) * partial_stride(width, heads);
  return (row_buffer_floats(width, threads) + partials) * static_cast<i64>(sizeof(float));
}

void add_layer_norm_forward(const TensorView& x, const TensorView& residual, const LayerNormAffine& affine,
                            const Dropout& dropout, const TensorView& out, const TensorView& total,
                            const TensorView& stats, const TensorView& workspace, int threads) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const ForwardRows<T> rows = forward_rows<T>(stats.shape[0], affine, out, stats, workspace);
    const AddForward<T> source{rows.width,      x.as<const T>(), residual.as<const T>(),       total.as<T>(),
                               key_of(dropout), dropout.p > 0,   streams<T>(total, rows.width)};
    layer_norm_forward(rows, source, threads);
  });
}

void add_layer_norm_backward(const TensorView& dout, const TensorView& dtotal, const TensorView& total,
                             const TensorView& stats, const LayerNormAffine& affine, const Dropout& dropout,
                             const TensorView& dx, const TensorView& dresidual, const AffineGradients& gradients,
                             const TensorView& workspace, int threads) {
  with_type(total.dtype, [&](auto type) {
    using T = decltype(type);
    const BackwardRows<T> rows = backward_rows<T>(dout, stats, affine, gradients, workspace, threads);
    const bool drops = dropout.p > 0;
    const bool stream = streams<T>(dresidual, rows.width) && (!drops || streams<T>(dx, rows.width));
    const AddBackward<T> source{
        rows.width, total.as<const T>(), dtotal.as<const T>(), dx.as<T>(), dresidual.as<T>(), key_of(dropout), drops,
        stream};
    layer_norm_backward(rows, source, nullptr, threads);
  });
}

void gelu_layer_norm_forward(const TensorView& x, const LayerNormAffine& affine, const TensorView& out,
                             const TensorView& stats, const TensorView& workspace, int threads) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const ForwardRows<T> rows = forward_rows<T>(stats.shape[0], affine, out, stats, workspace);
    layer_norm_forward(rows, Gelu<T>{rows.width, x.as<const T>()}, threads);
  });
}

void gelu_layer_norm_backward(const TensorView& dout, const TensorView& x, const TensorView& stats,
                              const LayerNormAffine& affine, const TensorView& dx, const AffineGradients& gradients,
                              const TensorView& workspace, int threads) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const BackwardRows<T> rows = backward_rows<T>(dout, stats, affine, gradients, workspace, threads);
    const Gelu<T> source{rows.width, x.as<const T>(), dx.as<T>(), streams<T>(dx, rows.width)};
    layer_norm_backward(rows, source, nullptr, threads);
  });
}

void head_scale_layer_norm_forward(const TensorView& x, const TensorView& head_scale, const LayerNormAffine& affine,
                                   const TensorView& out, const TensorView& stats, const TensorView& workspace,
                                   int threads) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const ForwardRows<T> rows = forward_rows<T>(stats.shape[0], affine, out, stats, workspace);
    const HeadScale<T> source{x.shape[1], x.shape[2], x.as<const T>(), head_scale.as<const float>()};
    layer_norm_forward(rows, source, threads);
  });
}

void head_scale_layer_norm_backward(const TensorView& dout, const TensorView& x, const TensorView& head_scale,
                                    const TensorView& stats, const LayerNormAffine& affine, const TensorView& dx,
                                    const TensorView& dhead_scale, const AffineGradients& gradients,
                                    const TensorView& workspace, int threads) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const BackwardRows<T> rows = backward_rows<T>(dout, stats, affine, gradients, workspace, threads);
    const HeadScale<T> source{x.shape[1], x.shape[2], x.as<const T>(), head_scale.as<const float>(), dx.as<T>()};
    layer_norm_backward(rows, source, dhead_scale.as<float>(), threads);
  });
}

}  // namespace ofakern::OFAKERN_ISA

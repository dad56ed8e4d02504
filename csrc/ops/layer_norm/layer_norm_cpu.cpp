// Residual, GELU and head scale before LayerNorm. Compiled once per instruction set; see core/isa.h.
#include "core/dropout.h"
#include "core/vec_normal.h"
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

  template <bool BACKWARD>
  OFAKERN_ALWAYS_INLINE void load(i64 row, float* z, float* keep) const {
    const T *a = x + row * width, *b = residual + row * width;
    T* const sum = total + row * width;
    if (drops) dropout_row(dropout, static_cast<std::uint32_t>(row), 0, kRowStream, width, keep);
    for_lanes(width, [&](i64 i, i64 n) {
      const Vec branch = vload_n(a + i, n), kept = drops ? vmul(branch, vload(keep + i)) : branch;
      const Vec value = round_as(vadd(vload_n(b + i, n), kept), a);
      vstore_out(sum + i, value, n, stream);
      vstore(z + i, value);
    });
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
  template <bool BACKWARD>
  OFAKERN_ALWAYS_INLINE void load(i64 row, float* z, float* keep) const {
    if (drops) dropout_row(dropout, static_cast<std::uint32_t>(row), 0, kRowStream, width, keep);
    for_lanes(width, [&](i64 i, i64 n) { vstore(z + i, vload_n(total + row * width + i, n)); });
  }
  OFAKERN_ALWAYS_INLINE void store(i64 row, const float* dz, const float* keep, float*) const {
    for_lanes(width, [&](i64 i, i64 n) {
      Vec gradient = vload(dz + i);
      if (dtotal != nullptr) gradient = vadd(gradient, vload_n(dtotal + row * width + i, n));
      vstore_out(dresidual + row * width + i, gradient, n, stream);
      if (drops) vstore_out(dx + row * width + i, vmul(gradient, vload(keep + i)), n, stream);
    });
  }
};

template <class T>
struct Gelu {
  i64 width;
  const T* x;
  T* dx = nullptr;
  bool stream = false;

  OFAKERN_ALWAYS_INLINE i64 own_sums() const { return 0; }
  template <bool BACKWARD>
  OFAKERN_ALWAYS_INLINE void load(i64 row, float* z, float* slope) const {
    for_lanes(width, [&](i64 i, i64 n) {
      const T* const here = x + row * width + i;
      // So much arithmetic hides the memory only when the next row is already on its way.
      __builtin_prefetch(here + width);
      const Vec value = vload_n(here, n);
      const NormalLanes normal = vnormal(value);
      vstore(z + i, vmul(value, normal.distribution));
      if (BACKWARD) vstore(slope + i, vfma(value, normal.density, normal.distribution));
    });
  }
  OFAKERN_ALWAYS_INLINE void store(i64 row, const float* dz, const float* slope, float*) const {
    for_lanes(width, [&](i64 i, i64 n) {
      vstore_out(dx + row * width + i, vmul(vload(dz + i), vload(slope + i)), n, stream);
    });
  }
};

template <class T>
struct HeadScale {
  i64 heads, head_width;
  const T* x;
  const float* scale;
  T* dx = nullptr;

  OFAKERN_ALWAYS_INLINE i64 own_sums() const { return heads; }
  template <bool BACKWARD>
  OFAKERN_ALWAYS_INLINE void load(i64 row, float* z, float*) const {
    const i64 width = heads * head_width;
    for (i64 h = 0; h < heads; ++h) {
      const Vec factor = vset(scale[h]);
      const T* const from = x + row * width + h * head_width;
      for_lanes(head_width,
                [&](i64 i, i64 n) { vstore_n(z + h * head_width + i, vmul(factor, vload_n(from + i, n)), n); });
    }
    for (i64 i = width; i % kWidth != 0; ++i) z[i] = 0.0f;
  }
  OFAKERN_ALWAYS_INLINE void store(i64 row, const float* dz, const float*, float* sums) const {
    for (i64 h = 0; h < heads; ++h) {
      const Vec factor = vset(scale[h]);
      const i64 start = (row * heads + h) * head_width;
      Vec sum = vzero();
      for_lanes(head_width, [&](i64 i, i64 n) {
        const Vec gradient = vload_n(dz + h * head_width + i, n);
        sum = vfma(gradient, vload_n(x + start + i, n), sum);
        vstore_n(dx + start + i, vmul(factor, gradient), n);
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

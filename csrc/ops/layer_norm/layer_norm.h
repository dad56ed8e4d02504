// LayerNorm fused with what stands before it: the contract of four ops that share their row arithmetic.
//
//   add_layer_norm         z[n] = residual[n] + keep[n] * x[n] / (1 - p)             also returned, as `total`
//   gelu_layer_norm        z[n] = x[n] * Phi(x[n])                                   exact (erf) GELU
//   head_scale_layer_norm  z[n, h, k] = head_scale[h] * x[n, h, k]                   D = H * K
//   embed_layer_norm       z[n] = scale * table[tokens[n]] + type_table[types[n]]
//
//   out[n] = (z[n] - mean(z[n])) / sqrt(var(z[n]) + eps) * weight + bias             var: the biased one
//
// keep[n, d] is bit-exact on every backend: word (d mod 4) of Philox4x32-10 with the counter (d / 4, n, 0, 2^32 - 1)
// and the key seed + offset * 0x9E3779B97F4A7C15 is at least round(p * 2^32).
//
// Activations (x, residual, table, out, ...) are f32, bf16 or f16, all of one dtype; weight, bias, head_scale, their
// gradients and all statistics are f32. Everything is contiguous; rows are all leading dimensions together, N of width
// D. add_layer_norm normalises `total` as it is stored (rounded to the dtype), as the unfused ops would.
//
// Saved for backward: stats f32 [N, 2] (mean, 1 / sqrt(var + eps)), and an input (add: total) to recompute z from.
// Gradients of weight, bias, head_scale are sums over rows in an order that N alone fixes, those of the tables sums
// over the rows' occurrences in order. Flops, bytes and limits: README.md beside this file.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace ofakern {

struct LayerNormAffine {
  TensorView weight;  // f32 [D]
  TensorView bias;    // f32 [D]; not read by a backward pass
  double eps;
};

struct Dropout {
  TensorView seed;  // i64 [2]: seed, offset; undefined when p == 0
  double p;         // in [0, 1)
};

struct AffineGradients {
  TensorView dweight, dbias;  // f32 [D]
};

struct EmbedInputs {
  TensorView tokens;      // i64 [N], each in [0, V)
  TensorView table;       // [V, D]
  TensorView types;       // i64 [N], each in [0, T); undefined: 0 everywhere (T = 1)
  TensorView type_table;  // [T, D]; undefined: no type embedding
  double scale;
};

// Bytes of scratch for a call on `rows` rows of `width`; `heads`: H of head_scale_layer_norm, else 0.
std::int64_t layer_norm_forward_workspace(std::int64_t width, int threads);
std::int64_t layer_norm_backward_workspace(std::int64_t rows, std::int64_t width, std::int64_t heads, int threads);
// `entries`: V + T.
std::int64_t embed_layer_norm_backward_workspace(std::int64_t rows, std::int64_t width, std::int64_t entries,
                                                 int threads);

void add_layer_norm_forward_cpu(const TensorView& x, const TensorView& residual, const LayerNormAffine& affine,
                                const Dropout& dropout, const TensorView& out, const TensorView& total,
                                const TensorView& stats, const TensorView& workspace, int threads);
// dtotal may be undefined (nothing flows into `total`). dx is undefined exactly when p == 0: it then equals dresidual.
void add_layer_norm_backward_cpu(const TensorView& dout, const TensorView& dtotal, const TensorView& total,
                                 const TensorView& stats, const LayerNormAffine& affine, const Dropout& dropout,
                                 const TensorView& dx, const TensorView& dresidual, const AffineGradients& gradients,
                                 const TensorView& workspace, int threads);

void gelu_layer_norm_forward_cpu(const TensorView& x, const LayerNormAffine& affine, const TensorView& out,
                                 const TensorView& stats, const TensorView& workspace, int threads);
void gelu_layer_norm_backward_cpu(const TensorView& dout, const TensorView& x, const TensorView& stats,
                                  const LayerNormAffine& affine, const TensorView& dx, const AffineGradients& gradients,
                                  const TensorView& workspace, int threads);

// x [N, H, K], head_scale f32 [H], out [N, H * K].
void head_scale_layer_norm_forward_cpu(const TensorView& x, const TensorView& head_scale, const LayerNormAffine& affine,
                                       const TensorView& out, const TensorView& stats, const TensorView& workspace,
                                       int threads);
void head_scale_layer_norm_backward_cpu(const TensorView& dout, const TensorView& x, const TensorView& head_scale,
                                        const TensorView& stats, const LayerNormAffine& affine, const TensorView& dx,
                                        const TensorView& dhead_scale, const AffineGradients& gradients,
                                        const TensorView& workspace, int threads);

void embed_layer_norm_forward_cpu(const EmbedInputs& in, const LayerNormAffine& affine, const TensorView& out,
                                  const TensorView& stats, const TensorView& workspace, int threads);
// dtable [V, D] and dtype_table [T, D] are fully written (0 where no row reads an entry). `zeros`: dtable holds zeros
// already, and only entries that a row reads are written.
void embed_layer_norm_backward_cpu(const TensorView& dout, const EmbedInputs& in, const TensorView& stats,
                                   const LayerNormAffine& affine, const TensorView& dtable,
                                   const TensorView& dtype_table, bool zeros, const AffineGradients& gradients,
                                   const TensorView& workspace, int threads);

}  // namespace ofakern

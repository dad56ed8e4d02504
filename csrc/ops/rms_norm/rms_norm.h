// Root-mean-square norm: the contract.
//
//   out[n, d] = x[n, d] * rstd[n] * weight[d]          rstd[n] = 1 / sqrt(mean_d(x[n, d]^2) + eps)
//
// x, out and their gradients are f32, bf16 or f16, all of one dtype; weight, its gradient and rstd are f32. Everything
// is contiguous; rows are all leading dimensions together, N of width D.
//
// Saved for backward: x and rstd f32 [N]. With g = dout * weight and xhat = x * rstd:
//
//   dx = rstd * (g - xhat * mean_d(g * xhat))          dweight = sum_n dout * xhat
//
// The sum over rows has an order that N alone fixes. Source: Zhang and Sennrich, Root Mean Square Layer Normalization,
// arXiv 1910.07467. Flops, bytes and limits: README.md beside this file.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace ofakern {

std::int64_t rms_norm_backward_workspace(std::int64_t rows, std::int64_t width);

void rms_norm_forward_cpu(const TensorView& x, const TensorView& weight, double eps, const TensorView& out,
                          const TensorView& rstd, int threads);
void rms_norm_backward_cpu(const TensorView& dout, const TensorView& x, const TensorView& rstd,
                           const TensorView& weight, const TensorView& dx, const TensorView& dweight,
                           const TensorView& workspace, int threads);

}  // namespace ofakern

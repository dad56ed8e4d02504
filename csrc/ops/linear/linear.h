// The gradient of a linear layer's weight and bias: the contract.
//
//   y[n, o] = sum_i x[n, i] W[o, i] + b[o]      (torch's product, as is dx = dy W)
//
//   dW[o, i] = sum_n dy[n, o] x[n, i]           db[o] = sum_n dy[n, o]
//
// x [N, I] and dy [N, O] are f32, bf16 or f16 of one dtype, row-major; dW [O, I] and db [O] have that dtype, sums are
// f32 and rounded once. Their order is N's alone. Derivation, floor and measurements: README.md beside this file.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace ofakern {

std::int64_t linear_backward_workspace(const TensorView& dy, const TensorView& x, int threads);

// dbias may be undefined. Both results are fully written; without a row they are 0.
void linear_backward_cpu(const TensorView& dy, const TensorView& x, const TensorView& dweight, const TensorView& dbias,
                         const TensorView& workspace, int threads);

}  // namespace ofakern

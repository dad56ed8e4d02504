// Six numbers to a rotation matrix (Zhou et al., arXiv 1812.07035): Gram-Schmidt on two columns.
//
//   b1 = a1 / max(|a1|, eps)    u = a2 - (b1.a2) b1    b2 = u / max(|u|, eps)    b3 = b1 x b2        eps = 1e-12
//
// x [..., 6] = (a1, a2); out [..., 3, 3] has the columns b1, b2, b3. f32, bf16 or f16, arithmetic in f32; contiguous.
// Backward recomputes everything from x. Where a length is below eps it is a constant, as in torch's normalize.
#pragma once

#include "core/stream.h"
#include "core/tensor_view.h"

namespace ofakern {

void check_rotation_6d_forward(const TensorView& x, const TensorView& out);
void check_rotation_6d_backward(const TensorView& dout, const TensorView& x, const TensorView& dx);

void rotation_6d_forward_cpu(const TensorView& x, const TensorView& out, int threads);
void rotation_6d_backward_cpu(const TensorView& dout, const TensorView& x, const TensorView& dx, int threads);

void rotation_6d_forward_cuda(const TensorView& x, const TensorView& out, Stream stream);
void rotation_6d_backward_cuda(const TensorView& dout, const TensorView& x, const TensorView& dx, Stream stream);

}  // namespace ofakern

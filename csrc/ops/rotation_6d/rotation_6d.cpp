// Checks the arguments, then calls the active instruction set's kernel.
#include "ops/rotation_6d/rotation_6d.h"

#include "core/isa.h"

namespace ofakern {

OFAKERN_DECLARE_FOR_EACH_ISA(void rotation_6d_forward(const TensorView& x, const TensorView& out, int threads);
                             void rotation_6d_backward(const TensorView& dout, const TensorView& x,
                                                       const TensorView& dx, int threads);)

void rotation_6d_forward_cpu(const TensorView& x, const TensorView& out, int threads) {
  check_rotation_6d_forward(x, out);
  OFAKERN_DISPATCH(rotation_6d_forward, x, out, threads);
}

void rotation_6d_backward_cpu(const TensorView& dout, const TensorView& x, const TensorView& dx, int threads) {
  check_rotation_6d_backward(dout, x, dx);
  OFAKERN_DISPATCH(rotation_6d_backward, dout, x, dx, threads);
}

}  // namespace ofakern

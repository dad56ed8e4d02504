// Checks every argument against the contract in rotation_6d.h, for all of its backends.
#include <string>

#include "core/check.h"
#include "ops/rotation_6d/rotation_6d.h"

namespace ofakern {
namespace {

constexpr Checker kCheck("rotation_6d");

void check_tensor(const char* argument, const TensorView& x, DType dtype, std::int64_t elements) {
  kCheck.dtype(argument, x, {dtype});
  kCheck.device(argument, x);
  kCheck.contiguous(argument, x);
  kCheck.that(x.numel() == elements, argument, "have " + std::to_string(elements) + " elements", describe(x));
}

void check_input(const TensorView& x) {
  kCheck.dtype("x", x, {DType::f32, DType::bf16, DType::f16});
  kCheck.that(x.ndim >= 1 && x.shape[x.ndim - 1] == 6, "x", "have shape [..., 6]", describe(x));
  check_tensor("x", x, x.dtype, x.numel());
}

}  // namespace

void check_rotation_6d_forward(const TensorView& x, const TensorView& out) {
  check_input(x);
  check_tensor("out", out, x.dtype, x.numel() / 6 * 9);
}

void check_rotation_6d_backward(const TensorView& dout, const TensorView& x, const TensorView& dx) {
  check_input(x);
  check_tensor("dout", dout, x.dtype, x.numel() / 6 * 9);
  check_tensor("dx", dx, x.dtype, x.numel());
}

}  // namespace ofakern

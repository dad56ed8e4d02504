// Checks every argument against the contract in rms_norm.h, then calls the active instruction set's kernel.
#include "ops/rms_norm/rms_norm.h"

#include <string>

#include "core/check.h"
#include "core/isa.h"

namespace ofakern {

OFAKERN_DECLARE_FOR_EACH_ISA(std::int64_t rms_norm_backward_workspace(std::int64_t rows, std::int64_t width);
                             void rms_norm_forward(const TensorView& x, const TensorView& weight, double eps,
                                                   const TensorView& out, const TensorView& rstd, int threads);
                             void rms_norm_backward(const TensorView& dout, const TensorView& x, const TensorView& rstd,
                                                    const TensorView& weight, const TensorView& dx,
                                                    const TensorView& dweight, const TensorView& workspace,
                                                    int threads);)

namespace {

const Checker& checker() {
  static const Checker check("rms_norm");
  return check;
}

void check_cpu(const char* argument, const TensorView& x, DType dtype, std::int64_t elements) {
  const Checker& check = checker();
  check.dtype(argument, x, {dtype});
  check.device(argument, x, Device::cpu);
  check.contiguous(argument, x);
  check.that(x.numel() == elements, argument, "have " + std::to_string(elements) + " elements", describe(x));
}

// The number of rows.
std::int64_t check_inputs(const TensorView& x, const TensorView& weight) {
  const Checker& check = checker();
  check.dtype("x", x, {DType::f32, DType::bf16, DType::f16});
  check.that(x.ndim >= 1 && x.shape[x.ndim - 1] > 0, "x", "have shape [..., D], D at least 1", describe(x));
  const std::int64_t width = x.shape[x.ndim - 1];
  check_cpu("x", x, x.dtype, x.numel());
  check.shape("weight", weight, "[D]", {width});
  check_cpu("weight", weight, DType::f32, width);
  return x.numel() / width;
}

}  // namespace

std::int64_t rms_norm_backward_workspace(std::int64_t rows, std::int64_t width) {
  checker().that(rows >= 0, "rows", "be at least 0", std::to_string(rows));
  checker().that(width >= 1, "width", "be at least 1", std::to_string(width));
  return OFAKERN_DISPATCH(rms_norm_backward_workspace, rows, width);
}

void rms_norm_forward_cpu(const TensorView& x, const TensorView& weight, double eps, const TensorView& out,
                          const TensorView& rstd, int threads) {
  const std::int64_t rows = check_inputs(x, weight);
  checker().that(eps >= 0, "eps", "be at least 0", std::to_string(eps));
  check_cpu("out", out, x.dtype, x.numel());
  check_cpu("rstd", rstd, DType::f32, rows);
  OFAKERN_DISPATCH(rms_norm_forward, x, weight, eps, out, rstd, threads);
}

void rms_norm_backward_cpu(const TensorView& dout, const TensorView& x, const TensorView& rstd,
                           const TensorView& weight, const TensorView& dx, const TensorView& dweight,
                           const TensorView& workspace, int threads) {
  const std::int64_t rows = check_inputs(x, weight), width = weight.shape[0];
  check_cpu("dout", dout, x.dtype, x.numel());
  check_cpu("rstd", rstd, DType::f32, rows);
  check_cpu("dx", dx, x.dtype, x.numel());
  check_cpu("dweight", dweight, DType::f32, width);
  checker().workspace("workspace", workspace, rms_norm_backward_workspace(rows, width));
  OFAKERN_DISPATCH(rms_norm_backward, dout, x, rstd, weight, dx, dweight, workspace, threads);
}

}  // namespace ofakern

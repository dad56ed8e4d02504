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

// Text is made only where a rule is broken: small calls would notice.
constexpr Checker kCheck("rms_norm");

void check_activations(const char* argument, const TensorView& x, DType dtype, std::int64_t elements) {
  kCheck.dtype(argument, x, {dtype});
  kCheck.device(argument, x, Device::cpu);
  kCheck.contiguous(argument, x);
  if (x.numel() != elements) kCheck.fail_value(argument, "have " + std::to_string(elements) + " elements", describe(x));
}

// The number of rows.
std::int64_t check_inputs(const TensorView& x, const TensorView& weight) {
  kCheck.dtype("x", x, {DType::f32, DType::bf16, DType::f16});
  if (x.ndim < 1 || x.shape[x.ndim - 1] < 1) kCheck.fail_value("x", "have shape [..., D], D at least 1", describe(x));
  const std::int64_t width = x.shape[x.ndim - 1];
  check_activations("x", x, x.dtype, x.numel());
  kCheck.plain("weight", weight, "[D]", {width}, DType::f32);
  return x.numel() / width;
}

}  // namespace

std::int64_t rms_norm_backward_workspace(std::int64_t rows, std::int64_t width) {
  kCheck.that(rows >= 0, "rows", "be at least 0", std::to_string(rows));
  kCheck.that(width >= 1, "width", "be at least 1", std::to_string(width));
  return OFAKERN_DISPATCH(rms_norm_backward_workspace, rows, width);
}

void rms_norm_forward_cpu(const TensorView& x, const TensorView& weight, double eps, const TensorView& out,
                          const TensorView& rstd, int threads) {
  const std::int64_t rows = check_inputs(x, weight);
  if (!(eps >= 0)) kCheck.fail_value("eps", "be at least 0", std::to_string(eps));
  check_activations("out", out, x.dtype, x.numel());
  kCheck.plain("rstd", rstd, "[N]", {rows}, DType::f32);
  OFAKERN_DISPATCH(rms_norm_forward, x, weight, eps, out, rstd, threads);
}

void rms_norm_backward_cpu(const TensorView& dout, const TensorView& x, const TensorView& rstd,
                           const TensorView& weight, const TensorView& dx, const TensorView& dweight,
                           const TensorView& workspace, int threads) {
  const std::int64_t rows = check_inputs(x, weight), width = weight.shape[0];
  check_activations("dout", dout, x.dtype, x.numel());
  kCheck.plain("rstd", rstd, "[N]", {rows}, DType::f32);
  check_activations("dx", dx, x.dtype, x.numel());
  kCheck.plain("dweight", dweight, "[D]", {width}, DType::f32);
  kCheck.workspace("workspace", workspace, rms_norm_backward_workspace(rows, width));
  OFAKERN_DISPATCH(rms_norm_backward, dout, x, rstd, weight, dx, dweight, workspace, threads);
}

}  // namespace ofakern

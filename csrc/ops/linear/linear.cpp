// Checks every argument against the contract in linear.h, then calls the active instruction set's kernel.
#include "ops/linear/linear.h"

#include <cstring>
#include <string>

#include "core/check.h"
#include "core/huge_pages.h"
#include "core/isa.h"

namespace ofakern {

OFAKERN_DECLARE_FOR_EACH_ISA(std::int64_t linear_backward_workspace(const TensorView& dy, const TensorView& x,
                                                                    int threads);
                             void linear_backward(const TensorView& dy, const TensorView& x, const TensorView& dweight,
                                                  const TensorView& dbias, void* workspace, int threads);)

namespace {

constexpr Checker kCheck("linear");

void check_inputs(const TensorView& dy, const TensorView& x) {
  kCheck.dtype("x", x, {DType::f32, DType::bf16, DType::f16});
  kCheck.plain("x", x, "[N, I]", {-1, -1}, x.dtype);
  kCheck.plain("dy", dy, "[N, O]", {x.shape[0], -1}, x.dtype);
  kCheck.that(x.shape[1] >= 1, "I", "be at least 1", std::to_string(x.shape[1]));
  kCheck.that(dy.shape[1] >= 1, "O", "be at least 1", std::to_string(dy.shape[1]));
}

void clear(const TensorView& x) { std::memset(x.data, 0, static_cast<std::size_t>(x.numel() * size_of(x.dtype))); }

}  // namespace

std::int64_t linear_backward_workspace(const TensorView& dy, const TensorView& x, int threads) {
  check_inputs(dy, x);
  if (x.shape[0] == 0) return 0;
  return OFAKERN_DISPATCH(linear_backward_workspace, dy, x, threads);
}

void linear_backward_cpu(const TensorView& dy, const TensorView& x, const TensorView& dweight, const TensorView& dbias,
                         const TensorView& workspace, int threads) {
  check_inputs(dy, x);
  kCheck.plain("dweight", dweight, "[O, I]", {dy.shape[1], x.shape[1]}, x.dtype);
  if (dbias.defined()) kCheck.plain("dbias", dbias, "[O]", {dy.shape[1]}, x.dtype);
  if (x.shape[0] == 0) {
    clear(dweight);
    if (dbias.defined()) clear(dbias);
    return;
  }
  kCheck.workspace("workspace", workspace, OFAKERN_DISPATCH(linear_backward_workspace, dy, x, threads));
  prefer_huge_pages(dweight.data, dweight.numel() * size_of(dweight.dtype));
  OFAKERN_DISPATCH(linear_backward, dy, x, dweight, dbias, workspace.data, threads);
}

}  // namespace ofakern

// Checks the arguments, then calls the active instruction set's kernel.
#include "ops/attention/attention.h"

#include "core/check.h"
#include "core/isa.h"
#include "ops/attention/attention_checked.h"

namespace ofakern {

OFAKERN_DECLARE_FOR_EACH_ISA(std::int64_t attention_forward_workspace(const AttentionInputs& in, int threads);
                             std::int64_t attention_backward_workspace(const AttentionInputs& in, int threads);
                             void attention_forward(const AttentionInputs& in, const TensorView& out,
                                                    const TensorView& lse, const TensorView& workspace, int threads);
                             void attention_backward(const AttentionInputs& in, const TensorView& out,
                                                     const TensorView& lse, const TensorView& dout,
                                                     const TensorView& dlse, const AttentionGradients& gradients,
                                                     const TensorView& workspace, int threads);)

namespace {

constexpr Checker kCheck("attention");

}  // namespace

std::int64_t checked_attention_forward_workspace(const AttentionInputs& inputs, int threads) {
  return OFAKERN_DISPATCH(attention_forward_workspace, inputs, threads);
}

std::int64_t checked_attention_backward_workspace(const AttentionInputs& inputs, int threads) {
  return OFAKERN_DISPATCH(attention_backward_workspace, inputs, threads);
}

void checked_attention_forward(const AttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                               const TensorView& workspace, int threads) {
  OFAKERN_DISPATCH(attention_forward, inputs, out, lse, workspace, threads);
}

void checked_attention_backward(const AttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                                const TensorView& dout, const TensorView& dlse, const AttentionGradients& gradients,
                                const TensorView& workspace, int threads) {
  OFAKERN_DISPATCH(attention_backward, inputs, out, lse, dout, dlse, gradients, workspace, threads);
}

std::int64_t attention_forward_workspace(const AttentionInputs& inputs, int threads) {
  check_attention(inputs);
  return checked_attention_forward_workspace(inputs, threads);
}

std::int64_t attention_backward_workspace(const AttentionInputs& inputs, int threads) {
  check_attention(inputs);
  return checked_attention_backward_workspace(inputs, threads);
}

void attention_forward_cpu(const AttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                           const TensorView& workspace, int threads) {
  check_attention(inputs);
  check_attention_results(inputs, out, lse);
  kCheck.workspace("workspace", workspace, checked_attention_forward_workspace(inputs, threads));
  checked_attention_forward(inputs, out, lse, workspace, threads);
}

void attention_backward_cpu(const AttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                            const TensorView& dout, const TensorView& dlse, const AttentionGradients& gradients,
                            const TensorView& workspace, int threads) {
  check_attention(inputs);
  check_attention_results(inputs, out, lse);
  check_attention_gradients(inputs, dout, dlse, gradients);
  kCheck.workspace("workspace", workspace, checked_attention_backward_workspace(inputs, threads));
  checked_attention_backward(inputs, out, lse, dout, dlse, gradients, workspace, threads);
}

}  // namespace ofakern

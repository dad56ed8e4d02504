// The CPU kernel without its checks: for a caller that has made them (check_attention) and makes results and workspace
// itself.
#pragma once

#include "ops/attention/attention.h"

namespace ofakern {

std::int64_t checked_attention_forward_workspace(const AttentionInputs& inputs, int threads);
std::int64_t checked_attention_backward_workspace(const AttentionInputs& inputs, int threads);
void checked_attention_forward(const AttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                               const TensorView& workspace, int threads);
void checked_attention_backward(const AttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                                const TensorView& dout, const TensorView& dlse, const AttentionGradients& gradients,
                                const TensorView& workspace, int threads);

}  // namespace ofakern

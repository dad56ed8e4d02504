// The CPU kernel without its checks: for a caller that has made them, once per layout where it can (check_attention and
// its halves), and makes results and workspace itself.
#pragma once

#include "ops/attention/attention.h"

namespace ofakern {

// The two halves of check_attention. All but the layout's values:
void check_attention_shapes(const AttentionInputs& inputs);
// The layout for so many queries and keys, and rows of q_pos and k_pos where samples share positions.
void check_attention_layout(const AttentionLayoutView& layout, std::int64_t queries, std::int64_t keys,
                            std::int64_t q_rows, std::int64_t k_rows);

std::int64_t checked_attention_forward_workspace(const AttentionInputs& inputs, int threads);
std::int64_t checked_attention_backward_workspace(const AttentionInputs& inputs, int threads);
void checked_attention_forward(const AttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                               const TensorView& workspace, int threads);
void checked_attention_backward(const AttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                                const TensorView& dout, const TensorView& dlse, const AttentionGradients& gradients,
                                const TensorView& workspace, int threads);

}  // namespace ofakern

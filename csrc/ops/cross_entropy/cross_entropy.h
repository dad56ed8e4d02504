// Label-smoothed cross entropy fused with the output projection: the contract every backend keeps.
//
//   s[i,j] = hidden[i] . weight[j] + bias[j]                for the A_i ids that token i allows
//   nll[i] = lse_j s[i,j] - s[i, labels[i]]
//   loss[i] = (1 - epsilon - each) * nll[i] + each * sum over allowed j of (lse_i - s[i,j]),   each = epsilon / (A_i -
//   1)
//
// (each = 0 where A_i = 1). A token with label -100 gives loss = nll = 0 and no gradient. A label that is not allowed
// gives loss = nll = inf and the gradient of its other terms.
//
// Allowed ids: all V; or the token's row of a CSR table (an empty row allows all); or {0 .. always - 1} and [lo, hi).
// Shapes: N tokens, D width, V vocabulary. f32 accumulation and statistics; gradients have their inputs' dtype.
// dweight is summed in f32 over the tokens of a chunk (README.md) and rounded to its dtype after each chunk.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace ofakern {

struct CrossEntropyInputs {
  TensorView hidden;   // [N, D], last dimension contiguous
  TensorView weight;   // [V, D], last dimension contiguous
  TensorView bias;     // [V] like weight, or undefined
  TensorView labels;   // i64 [N]: an id, or -100
  TensorView offsets;  // i64 [N + 1] with ids i64 [nnz]: the CSR table; both undefined without
  TensorView ids;
  TensorView range;     // i32 [N, 2] or [1, 2] (for all tokens): lo, hi; undefined without; not together with offsets
  std::int64_t always;  // ids below it are allowed beside the range
  double epsilon;       // in [0, 1)
};

// What a token's loss is made of; all f32 [N], contiguous.
struct CrossEntropyLosses {
  TensorView loss, nll, lse;
  TensorView best;  // i64 [N]: the first allowed id of the largest score; -100 where there is no label; or undefined
};

// The same summed over tokens, f32 []; tokens i64 []: how many have a label.
struct CrossEntropySums {
  TensorView loss, nll, tokens;
};

// Contiguous, like their inputs; undefined where not wanted.
struct CrossEntropyGradients {
  TensorView dhidden, dweight, dbias;
};

// Bytes of scratch for a call. The caller allocates; kernels never do.
std::int64_t cross_entropy_forward_workspace(const CrossEntropyInputs& inputs, const CrossEntropyLosses& losses,
                                             const CrossEntropyGradients& gradients, int threads);
std::int64_t cross_entropy_backward_workspace(const CrossEntropyInputs& inputs, const CrossEntropyGradients& gradients,
                                              int threads);

// Losses, and where wanted the gradients of their sum: one product less than forward and backward apart.
void cross_entropy_forward_cpu(const CrossEntropyInputs& inputs, const CrossEntropyLosses& losses,
                               const CrossEntropyGradients& gradients, const TensorView& workspace, int threads);

// The sums in the order of tokens.
void cross_entropy_sum(const TensorView& labels, const CrossEntropyLosses& losses, const CrossEntropySums& sums);

// Gradients for dloss f32 [N], from the forward's lse; scores are computed again. Tokens with dloss = 0 cost nothing.
void cross_entropy_backward_cpu(const CrossEntropyInputs& inputs, const TensorView& dloss, const TensorView& lse,
                                const CrossEntropyGradients& gradients, const TensorView& workspace, int threads);

}  // namespace ofakern

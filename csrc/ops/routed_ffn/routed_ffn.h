// Linear maps of tokens grouped by expert, the matrix products of a routed feed-forward layer: the contract.
//
//   place p of expert e (its tokens stand end to end):  y[target[p]] = x[source[p]] . weights[e]^T + biases[e]
//
// source and target are permutations of the N rows, identity where undefined: grouping and ungrouping the tokens is
// part of the products' packing. Shapes: N tokens, E experts, counts[e] tokens of each, K width in, O width out. f32
// accumulation; results have x's dtype.
#pragma once

#include <cstdint>
#include <vector>

#include "core/tensor_view.h"

namespace ofakern {

struct RoutedLinearInputs {
  TensorView x;                      // [N, K], contiguous, as everything here
  std::vector<TensorView> weights;   // E of [O, K]
  std::vector<TensorView> biases;    // E of [O], or none
  std::vector<std::int64_t> counts;  // E, their sum is N
  TensorView source, target;         // i64 [N] or undefined
};

struct RoutedLinearGradients {
  TensorView dx;                     // [N, K] or undefined
  std::vector<TensorView> dweights;  // E of [O, K], or none
  std::vector<TensorView> dbiases;   // E of [O], or none; only with dweights
};

std::int64_t routed_linear_forward_workspace(const RoutedLinearInputs& inputs, int threads);
std::int64_t routed_linear_backward_workspace(const RoutedLinearInputs& inputs, const RoutedLinearGradients& gradients,
                                              int threads);

// y [N, O], fully written.
void routed_linear_forward_cpu(const RoutedLinearInputs& inputs, const TensorView& y, const TensorView& workspace,
                               int threads);

// dy [N, O]. An expert without tokens has the gradient 0.
void routed_linear_backward_cpu(const RoutedLinearInputs& inputs, const TensorView& dy,
                                const RoutedLinearGradients& gradients, const TensorView& workspace, int threads);

}  // namespace ofakern

// Checks every argument against the contract in routed_ffn.h, then calls the active instruction set's kernel.
#include "ops/routed_ffn/routed_ffn.h"

#include <algorithm>
#include <string>

#include "core/check.h"
#include "core/huge_pages.h"
#include "core/isa.h"
#include "ops/routed_ffn/routed_ffn_call.h"

namespace ofakern {

OFAKERN_DECLARE_FOR_EACH_ISA(std::int64_t routed_linear_forward_workspace(const RoutedLinearCall& call, int threads);
                             std::int64_t routed_linear_backward_workspace(const RoutedLinearCall& call, int threads);
                             void routed_linear_forward(const RoutedLinearCall& call, void* workspace, int threads);
                             void routed_linear_backward(const RoutedLinearCall& call, void* workspace, int threads);)

namespace {

constexpr Checker kCheck("routed_ffn");

void check_permutation(const char* argument, const TensorView& index, std::int64_t tokens) {
  if (!index.defined()) return;
  kCheck.plain(argument, index, "[N]", {tokens}, DType::i64);
  std::vector<bool> seen(static_cast<std::size_t>(tokens), false);
  for (std::int64_t p = 0; p < tokens; ++p) {
    const std::int64_t row = index.as<const std::int64_t>()[p];
    const bool fresh = row >= 0 && row < tokens && !seen[static_cast<std::size_t>(row)];
    kCheck.that(fresh, argument, "be a permutation of the N=" + std::to_string(tokens) + " rows",
                std::to_string(row) + " at " + std::to_string(p));
    seen[static_cast<std::size_t>(row)] = true;
  }
}

void check_inputs(const RoutedLinearInputs& in) {
  kCheck.dtype("x", in.x, {DType::f32, DType::bf16, DType::f16});
  kCheck.ndim("x", in.x, 2, "[N, K]");
  const std::int64_t tokens = in.x.shape[0], width = in.x.shape[1];
  kCheck.plain("x", in.x, "[N, K]", {tokens, width}, in.x.dtype);
  kCheck.that(width >= 1, "K", "be at least 1", std::to_string(width));
  const std::size_t experts = in.weights.size();
  kCheck.that(experts >= 1, "weights", "name at least one expert", "none");
  kCheck.ndim("weights[0]", in.weights[0], 2, "[O, K]");
  const std::int64_t out = in.weights[0].shape[0];
  for (const TensorView& weight : in.weights) kCheck.plain("weights", weight, "[O, K]", {out, width}, in.x.dtype);
  kCheck.that(in.biases.empty() || in.biases.size() == experts, "biases", "be one per expert or none",
              std::to_string(in.biases.size()));
  for (const TensorView& bias : in.biases) kCheck.plain("biases", bias, "[O]", {out}, in.x.dtype);
  kCheck.that(in.counts.size() == experts, "counts", "be one per expert", std::to_string(in.counts.size()));
  std::int64_t sum = 0;
  for (const std::int64_t count : in.counts) {
    kCheck.that(count >= 0, "counts", "be at least 0", std::to_string(count));
    sum += count;
  }
  kCheck.that(sum == tokens, "counts", "add up to N=" + std::to_string(tokens), std::to_string(sum));
  check_permutation("source", in.source, tokens);
  check_permutation("target", in.target, tokens);
}

void check_gradients(const RoutedLinearInputs& in, const RoutedLinearGradients& gradients) {
  const std::int64_t width = in.x.shape[1], out = in.weights[0].shape[0];
  if (gradients.dx.defined()) kCheck.plain("dx", gradients.dx, "[N, K]", {in.x.shape[0], width}, in.x.dtype);
  const std::size_t weights = gradients.dweights.size(), biases = gradients.dbiases.size();
  kCheck.that(weights == 0 || weights == in.weights.size(), "dweights", "be one per expert or none",
              std::to_string(weights));
  kCheck.that(biases == 0 || biases == weights, "dbiases", "be one per expert beside dweights, or none",
              std::to_string(biases));
  for (const TensorView& dweight : gradients.dweights)
    kCheck.plain("dweights", dweight, "[O, K]", {out, width}, in.x.dtype);
  for (const TensorView& dbias : gradients.dbiases) kCheck.plain("dbiases", dbias, "[O]", {out}, in.x.dtype);
}

struct Prepared {
  RoutedLinearCall call = {};
  std::vector<RoutedExpert> experts;
};

Prepared prepare(const RoutedLinearInputs& in, const RoutedLinearGradients& gradients) {
  Prepared prepared;
  RoutedLinearCall& call = prepared.call;
  call.dtype = in.x.dtype;
  call.tokens = in.x.shape[0];
  call.in = in.x.shape[1];
  call.out = in.weights[0].shape[0];
  call.most = *std::max_element(in.counts.begin(), in.counts.end());
  call.x = in.x.data;
  call.dx = gradients.dx.data;
  call.wants_dx = gradients.dx.defined();
  call.wants_dweight = !gradients.dweights.empty();
  call.source = in.source.defined() ? in.source.as<const std::int64_t>() : nullptr;
  call.target = in.target.defined() ? in.target.as<const std::int64_t>() : nullptr;
  std::int64_t first = 0;
  for (std::size_t e = 0; e < in.weights.size(); ++e) {
    prepared.experts.push_back({in.weights[e].data, in.biases.empty() ? nullptr : in.biases[e].data,
                                gradients.dweights.empty() ? nullptr : gradients.dweights[e].data,
                                gradients.dbiases.empty() ? nullptr : gradients.dbiases[e].data, first, in.counts[e]});
    first += in.counts[e];
  }
  call.experts = prepared.experts.data();
  call.expert_count = static_cast<std::int64_t>(prepared.experts.size());
  return prepared;
}

}  // namespace

std::int64_t routed_linear_forward_workspace(const RoutedLinearInputs& inputs, int threads) {
  check_inputs(inputs);
  const Prepared prepared = prepare(inputs, {});
  return OFAKERN_DISPATCH(routed_linear_forward_workspace, prepared.call, threads);
}

std::int64_t routed_linear_backward_workspace(const RoutedLinearInputs& inputs, const RoutedLinearGradients& gradients,
                                              int threads) {
  check_inputs(inputs);
  check_gradients(inputs, gradients);
  const Prepared prepared = prepare(inputs, gradients);
  return OFAKERN_DISPATCH(routed_linear_backward_workspace, prepared.call, threads);
}

void routed_linear_forward_cpu(const RoutedLinearInputs& inputs, const TensorView& y, const TensorView& workspace,
                               int threads) {
  check_inputs(inputs);
  kCheck.plain("y", y, "[N, O]", {inputs.x.shape[0], inputs.weights[0].shape[0]}, inputs.x.dtype);
  Prepared prepared = prepare(inputs, {});
  prepared.call.y = y.data;
  kCheck.workspace("workspace", workspace, OFAKERN_DISPATCH(routed_linear_forward_workspace, prepared.call, threads));
  OFAKERN_DISPATCH(routed_linear_forward, prepared.call, workspace.data, threads);
}

void routed_linear_backward_cpu(const RoutedLinearInputs& inputs, const TensorView& dy,
                                const RoutedLinearGradients& gradients, const TensorView& workspace, int threads) {
  check_inputs(inputs);
  check_gradients(inputs, gradients);
  kCheck.plain("dy", dy, "[N, O]", {inputs.x.shape[0], inputs.weights[0].shape[0]}, inputs.x.dtype);
  Prepared prepared = prepare(inputs, gradients);
  prepared.call.dy = dy.data;
  kCheck.workspace("workspace", workspace, OFAKERN_DISPATCH(routed_linear_backward_workspace, prepared.call, threads));
  for (const TensorView& dweight : gradients.dweights)
    prefer_huge_pages(dweight.data, dweight.numel() * size_of(dweight.dtype));
  OFAKERN_DISPATCH(routed_linear_backward, prepared.call, workspace.data, threads);
}

}  // namespace ofakern

// Checks every argument against the contract in cross_entropy.h, then calls the active instruction set's kernel.
#include "ops/cross_entropy/cross_entropy.h"

#include <string>

#include "core/check.h"
#include "core/huge_pages.h"
#include "core/isa.h"

namespace ofakern {

OFAKERN_DECLARE_FOR_EACH_ISA(
    std::int64_t cross_entropy_workspace(const CrossEntropyInputs& in, bool with_losses, bool with_best,
                                         const CrossEntropyGradients& gradients, int threads);
    void cross_entropy_forward(const CrossEntropyInputs& in, const CrossEntropyLosses& losses,
                               const CrossEntropyGradients& gradients, const TensorView& workspace, int threads);
    void cross_entropy_backward(const CrossEntropyInputs& in, const TensorView& dloss, const TensorView& lse,
                                const CrossEntropyGradients& gradients, const TensorView& workspace, int threads);)

namespace {

constexpr std::int64_t kIgnored = -100;

// Text is made only where a rule is broken: small calls would notice.
constexpr Checker kCheck("cross_entropy");

void check_ids(const char* argument, const TensorView& ids, std::int64_t vocabulary, bool may_be_ignored) {
  const std::int64_t* id = ids.as<const std::int64_t>();
  for (std::int64_t n = 0; n < ids.numel(); ++n) {
    if (id[n] >= 0 && id[n] < vocabulary) continue;
    if (may_be_ignored && id[n] == kIgnored) continue;
    kCheck.fail_value(argument, "be in [0, V=" + std::to_string(vocabulary) + ")" + (may_be_ignored ? " or -100" : ""),
                      std::to_string(id[n]) + " at " + std::to_string(n));
  }
}

void check_allowed(const CrossEntropyInputs& in, std::int64_t tokens, std::int64_t vocabulary) {
  if (in.offsets.defined()) {
    kCheck.plain("allowed.offsets", in.offsets, "[N + 1]", {tokens + 1}, DType::i64);
    kCheck.plain("allowed.ids", in.ids, "[nnz]", {-1}, DType::i64);
    const std::int64_t* offsets = in.offsets.as<const std::int64_t>();
    bool rising = offsets[0] == 0 && offsets[tokens] == in.ids.numel();
    for (std::int64_t i = 0; i < tokens; ++i) rising = rising && offsets[i] <= offsets[i + 1];
    kCheck.that(rising, "allowed.offsets", "rise from 0 to the count of ids " + std::to_string(in.ids.numel()),
                "first " + std::to_string(offsets[0]) + ", last " + std::to_string(offsets[tokens]));
    check_ids("allowed.ids", in.ids, vocabulary, false);
    kCheck.absent("allowed_range", in.range, "beside allowed");
  }
  if (!in.range.defined()) return;
  kCheck.given("allowed_range", in.range);
  kCheck.ndim("allowed_range", in.range, 2, "[N, 2] or [1, 2]");
  kCheck.plain("allowed_range", in.range, "[N, 2] or [1, 2]", {in.range.shape[0] == 1 ? 1 : tokens, 2}, DType::i32);
}

void check_inputs(const CrossEntropyInputs& in) {
  kCheck.dtype("hidden", in.hidden, {DType::f32, DType::bf16, DType::f16});
  kCheck.ndim("hidden", in.hidden, 2, "[N, D]");
  const std::int64_t tokens = in.hidden.shape[0], width = in.hidden.shape[1];
  kCheck.device("hidden", in.hidden, Device::cpu);
  kCheck.last_contiguous("hidden", in.hidden);
  kCheck.given("weight", in.weight);
  kCheck.same_dtype("weight", in.weight, "hidden", in.hidden);
  kCheck.shape("weight", in.weight, "[V, D]", {-1, width});
  kCheck.device("weight", in.weight, Device::cpu);
  kCheck.last_contiguous("weight", in.weight);
  const std::int64_t vocabulary = in.weight.shape[0];
  if (vocabulary < 1 || vocabulary >= std::int64_t{1} << 31)
    kCheck.fail_value("V", "be in [1, 2^31)", std::to_string(vocabulary));
  if (in.bias.defined()) kCheck.plain("bias", in.bias, "[V]", {vocabulary}, in.hidden.dtype);
  kCheck.plain("labels", in.labels, "[N]", {tokens}, DType::i64);
  check_ids("labels", in.labels, vocabulary, true);
  if (in.always < 0) kCheck.fail_value("always_allowed", "be at least 0", std::to_string(in.always));
  check_allowed(in, tokens, vocabulary);
  if (!(in.epsilon >= 0 && in.epsilon < 1)) kCheck.fail_value("epsilon", "be in [0, 1)", std::to_string(in.epsilon));
}

void check_gradients(const CrossEntropyInputs& in, const CrossEntropyGradients& gradients) {
  const std::int64_t tokens = in.hidden.shape[0], width = in.hidden.shape[1], vocabulary = in.weight.shape[0];
  if (gradients.dhidden.defined())
    kCheck.plain("dhidden", gradients.dhidden, "[N, D]", {tokens, width}, in.hidden.dtype);
  if (gradients.dweight.defined())
    kCheck.plain("dweight", gradients.dweight, "[V, D]", {vocabulary, width}, in.hidden.dtype);
  if (!gradients.dbias.defined()) return;
  kCheck.that(in.bias.defined(), "dbias", "be None without a bias", "a tensor");
  kCheck.plain("dbias", gradients.dbias, "[V]", {vocabulary}, in.hidden.dtype);
}

void prepare_memory(const CrossEntropyGradients& gradients, const TensorView& workspace) {
  prefer_huge_pages(workspace.data, workspace.numel());
  if (gradients.dweight.defined())
    prefer_huge_pages(gradients.dweight.data, gradients.dweight.numel() * size_of(gradients.dweight.dtype));
}

}  // namespace

std::int64_t cross_entropy_forward_workspace(const CrossEntropyInputs& inputs, const CrossEntropyLosses& losses,
                                             const CrossEntropyGradients& gradients, int threads) {
  check_inputs(inputs);
  return OFAKERN_DISPATCH(cross_entropy_workspace, inputs, true, losses.best.defined(), gradients, threads);
}

std::int64_t cross_entropy_backward_workspace(const CrossEntropyInputs& inputs, const CrossEntropyGradients& gradients,
                                              int threads) {
  check_inputs(inputs);
  return OFAKERN_DISPATCH(cross_entropy_workspace, inputs, false, false, gradients, threads);
}

void cross_entropy_forward_cpu(const CrossEntropyInputs& inputs, const CrossEntropyLosses& losses,
                               const CrossEntropyGradients& gradients, const TensorView& workspace, int threads) {
  check_inputs(inputs);
  const std::int64_t tokens = inputs.hidden.shape[0];
  kCheck.plain("loss", losses.loss, "[N]", {tokens}, DType::f32);
  kCheck.plain("nll", losses.nll, "[N]", {tokens}, DType::f32);
  kCheck.plain("lse", losses.lse, "[N]", {tokens}, DType::f32);
  if (losses.best.defined()) kCheck.plain("best", losses.best, "[N]", {tokens}, DType::i64);
  check_gradients(inputs, gradients);
  kCheck.workspace("workspace", workspace,
                   OFAKERN_DISPATCH(cross_entropy_workspace, inputs, true, losses.best.defined(), gradients, threads));
  prepare_memory(gradients, workspace);
  OFAKERN_DISPATCH(cross_entropy_forward, inputs, losses, gradients, workspace, threads);
}

void cross_entropy_sum(const TensorView& labels, const CrossEntropyLosses& losses, const CrossEntropySums& sums) {
  const std::int64_t count = labels.numel();
  kCheck.plain("labels", labels, "[N]", {-1}, DType::i64);
  kCheck.plain("loss", losses.loss, "[N]", {count}, DType::f32);
  kCheck.plain("nll", losses.nll, "[N]", {count}, DType::f32);
  double loss = 0.0, nll = 0.0;
  std::int64_t tokens = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    loss += losses.loss.as<const float>()[i];
    nll += losses.nll.as<const float>()[i];
    tokens += labels.as<const std::int64_t>()[i] != kIgnored;
  }
  *sums.loss.as<float>() = static_cast<float>(loss);
  *sums.nll.as<float>() = static_cast<float>(nll);
  *sums.tokens.as<std::int64_t>() = tokens;
}

void cross_entropy_backward_cpu(const CrossEntropyInputs& inputs, const TensorView& dloss, const TensorView& lse,
                                const CrossEntropyGradients& gradients, const TensorView& workspace, int threads) {
  check_inputs(inputs);
  const std::int64_t tokens = inputs.hidden.shape[0];
  kCheck.plain("dloss", dloss, "[N]", {tokens}, DType::f32);
  kCheck.plain("lse", lse, "[N]", {tokens}, DType::f32);
  check_gradients(inputs, gradients);
  kCheck.workspace("workspace", workspace,
                   OFAKERN_DISPATCH(cross_entropy_workspace, inputs, false, false, gradients, threads));
  prepare_memory(gradients, workspace);
  OFAKERN_DISPATCH(cross_entropy_backward, inputs, dloss, lse, gradients, workspace, threads);
}

}  // namespace ofakern

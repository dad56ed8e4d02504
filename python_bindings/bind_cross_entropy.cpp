// ops.cross_entropy: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "ops/cross_entropy/cross_entropy.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr std::size_t kInputs = 10;  // what read_inputs takes, threads included

struct Call {
  CrossEntropyInputs inputs;
  int threads;
};

CrossEntropyInputs read_tensors(Arguments& args) {
  CrossEntropyInputs in;
  in.hidden = args.rows("hidden");
  in.weight = args.rows("weight");
  in.bias = args.tensor("bias");
  in.labels = args.tensor("labels");
  in.offsets = args.tensor("allowed.offsets");
  in.ids = args.tensor("allowed.ids");
  in.range = args.tensor("allowed_range");
  in.always = args.integer("always_allowed");
  in.epsilon = args.real("epsilon");
  return in;
}

Call read_inputs(Arguments& args) {
  const CrossEntropyInputs inputs = read_tensors(args);
  return {inputs, args.threads()};
}

CrossEntropyGradients read_gradients(Arguments& args) {
  CrossEntropyGradients gradients;
  gradients.dhidden = args.tensor("dhidden");
  gradients.dweight = args.tensor("dweight");
  gradients.dbias = args.tensor("dbias");
  return gradients;
}

CrossEntropyLosses read_losses(Arguments& args) {
  CrossEntropyLosses losses;
  losses.loss = args.tensor("loss");
  losses.nll = args.tensor("nll");
  losses.lse = args.tensor("lse");
  losses.best = args.tensor("best");
  return losses;
}

void forward(const py::args& values) {
  Arguments args("cross_entropy", values, 8 + kInputs);
  const CrossEntropyLosses losses = read_losses(args);
  const CrossEntropyGradients gradients = read_gradients(args);
  const TensorView workspace = args.tensor("workspace");
  const Call call = read_inputs(args);
  const py::gil_scoped_release release;
  cross_entropy_forward_cpu(call.inputs, losses, gradients, workspace, call.threads);
}

void backward(const py::args& values) {
  Arguments args("cross_entropy", values, 6 + kInputs);
  const CrossEntropyGradients gradients = read_gradients(args);
  const TensorView workspace = args.tensor("workspace");
  const TensorView dloss = args.tensor("dloss");
  const TensorView lse = args.tensor("lse");
  const Call call = read_inputs(args);
  const py::gil_scoped_release release;
  cross_entropy_backward_cpu(call.inputs, dloss, lse, gradients, workspace, call.threads);
}

// A schema cannot return None: what is not wanted is a tensor without elements.
TensorView make_gradient(Made& made, const TensorView& x, bool wanted, DType dtype) {
  if (wanted && x.defined()) return made.like(x);
  made.empty(dtype, {0});
  return {};
}

CrossEntropyGradients make_gradients(Made& made, const CrossEntropyInputs& in, const bool wanted[3]) {
  CrossEntropyGradients gradients;
  gradients.dhidden = make_gradient(made, in.hidden, wanted[0], in.hidden.dtype);
  gradients.dweight = make_gradient(made, in.weight, wanted[1], in.hidden.dtype);
  gradients.dbias = make_gradient(made, in.bias, wanted[2], in.hidden.dtype);
  return gradients;
}

// Per token: loss, nll, lse and best, without elements where it is not wanted.
py::object make_forward(const py::args& values) {
  Arguments args("cross_entropy", values, 1 + kInputs, Unready::copied);
  const Call call = read_inputs(args);
  const bool with_best = args.flag("best");
  const std::int64_t tokens = call.inputs.hidden.ndim > 0 ? call.inputs.hidden.shape[0] : 0;
  Made made;
  CrossEntropyLosses losses;
  losses.loss = made.empty(DType::f32, {tokens});
  losses.nll = made.empty(DType::f32, {tokens});
  losses.lse = made.empty(DType::f32, {tokens});
  const TensorView best = made.empty(DType::i64, {with_best ? tokens : 0});
  if (with_best) losses.best = best;
  const TensorView workspace = made.workspace(cross_entropy_forward_workspace(call.inputs, losses, {}, call.threads));
  {
    const py::gil_scoped_release release;
    cross_entropy_forward_cpu(call.inputs, losses, {}, workspace, call.threads);
  }
  return made.results();
}

// The sums of loss and nll, the count of tokens; lse and best per token; the gradients of the sum. None: what is not
// wanted, and lse where no gradient is. Losses of each token are scratch, behind the kernel's own.
py::object make_sums(const py::args& values) {
  Arguments args("cross_entropy", values, 4 + kInputs, Unready::copied);
  const int threads = args.threads();
  const CrossEntropyInputs in = read_tensors(args);
  const bool with_best = args.flag("best");
  const bool wanted[3] = {args.flag("wants_hidden"), args.flag("wants_weight"), args.flag("wants_bias")};
  const bool any = wanted[0] || wanted[1] || wanted[2];
  const std::int64_t tokens = in.hidden.ndim > 0 ? in.hidden.shape[0] : 0;
  Made made;
  const CrossEntropySums sums = {made.empty(DType::f32, {}), made.empty(DType::f32, {}), made.empty(DType::i64, {})};
  CrossEntropyLosses losses;
  losses.lse = any ? made.empty(DType::f32, {tokens}) : made.none();
  losses.best = with_best ? made.empty(DType::i64, {tokens}) : made.none();
  CrossEntropyGradients gradients;
  gradients.dhidden = wanted[0] ? made.like(in.hidden) : made.none();
  gradients.dweight = wanted[1] ? made.like(in.weight) : made.none();
  gradients.dbias = wanted[2] && in.bias.defined() ? made.like(in.bias) : made.none();
  const std::int64_t bytes = cross_entropy_forward_workspace(in, losses, gradients, threads);
  const TensorView workspace = made.workspace(bytes + 3 * tokens * static_cast<std::int64_t>(sizeof(float)));
  float* const each = reinterpret_cast<float*>(workspace.as<char>() + bytes);
  losses.loss = row_major_view(each, DType::f32, {tokens});
  losses.nll = row_major_view(each + tokens, DType::f32, {tokens});
  if (!any) losses.lse = row_major_view(each + 2 * tokens, DType::f32, {tokens});
  {
    const py::gil_scoped_release release;
    cross_entropy_forward_cpu(in, losses, gradients, workspace, threads);
    cross_entropy_sum(in.labels, losses, sums);
  }
  return made.results();
}

py::object make_backward(const py::args& values) {
  Arguments args("cross_entropy", values, 5 + kInputs, Unready::copied);
  const TensorView dloss = args.tensor("dloss");
  const TensorView lse = args.tensor("lse");
  const Call call = read_inputs(args);
  const bool wanted[3] = {args.flag("wants_hidden"), args.flag("wants_weight"), args.flag("wants_bias")};
  Made made;
  const CrossEntropyGradients gradients = make_gradients(made, call.inputs, wanted);
  const TensorView workspace = made.workspace(cross_entropy_backward_workspace(call.inputs, gradients, call.threads));
  {
    const py::gil_scoped_release release;
    cross_entropy_backward_cpu(call.inputs, dloss, lse, gradients, workspace, call.threads);
  }
  return made.results();
}

std::int64_t forward_workspace(const py::args& values) {
  Arguments args("cross_entropy", values, 7 + kInputs);
  const CrossEntropyLosses losses = read_losses(args);
  const CrossEntropyGradients gradients = read_gradients(args);
  const Call call = read_inputs(args);
  return cross_entropy_forward_workspace(call.inputs, losses, gradients, call.threads);
}

std::int64_t backward_workspace(const py::args& values) {
  Arguments args("cross_entropy", values, 3 + kInputs);
  const CrossEntropyGradients gradients = read_gradients(args);
  const Call call = read_inputs(args);
  return cross_entropy_backward_workspace(call.inputs, gradients, call.threads);
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  m.def("cross_entropy", &make_forward);
  m.def("cross_entropy_sums", &make_sums);
  m.def("cross_entropy_gradients", &make_backward);
  m.def("cross_entropy_forward", &forward);
  m.def("cross_entropy_backward", &backward);
  m.def("cross_entropy_forward_workspace", &forward_workspace);
  m.def("cross_entropy_backward_workspace", &backward_workspace);
}

}  // namespace ofakern

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

Call read_inputs(Arguments& args) {
  Call call;
  CrossEntropyInputs& in = call.inputs;
  in.hidden = args.rows("hidden");
  in.weight = args.rows("weight");
  in.bias = args.tensor("bias");
  in.labels = args.tensor("labels");
  in.offsets = args.tensor("allowed.offsets");
  in.ids = args.tensor("allowed.ids");
  in.range = args.tensor("allowed_range");
  in.always = args.integer("always_allowed");
  in.epsilon = args.real("epsilon");
  call.threads = args.threads();
  return call;
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

// loss, nll, lse, best and the three gradients; the flags say which of the last four are wanted.
py::object make_forward(const py::args& values) {
  Arguments args("cross_entropy", values, 4 + kInputs, Unready::copied);
  const Call call = read_inputs(args);
  const bool with_best = args.flag("best");
  const bool wanted[3] = {args.flag("wants_hidden"), args.flag("wants_weight"), args.flag("wants_bias")};
  const std::int64_t tokens = call.inputs.hidden.ndim > 0 ? call.inputs.hidden.shape[0] : 0;
  Made made;
  CrossEntropyLosses losses;
  losses.loss = made.empty(DType::f32, {tokens});
  losses.nll = made.empty(DType::f32, {tokens});
  losses.lse = made.empty(DType::f32, {tokens});
  const TensorView best = made.empty(DType::i64, {with_best ? tokens : 0});
  if (with_best) losses.best = best;
  const CrossEntropyGradients gradients = make_gradients(made, call.inputs, wanted);
  const TensorView workspace =
      made.workspace(cross_entropy_forward_workspace(call.inputs, losses, gradients, call.threads));
  {
    const py::gil_scoped_release release;
    cross_entropy_forward_cpu(call.inputs, losses, gradients, workspace, call.threads);
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
  m.def("cross_entropy_gradients", &make_backward);
  m.def("cross_entropy_forward", &forward);
  m.def("cross_entropy_backward", &backward);
  m.def("cross_entropy_forward_workspace", &forward_workspace);
  m.def("cross_entropy_backward_workspace", &backward_workspace);
}

}  // namespace ofakern

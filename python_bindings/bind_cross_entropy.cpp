// ops.cross_entropy: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "ops/cross_entropy/cross_entropy.h"
#include "tensor_caster.h"

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
  in.hidden = args.tensor("hidden");
  in.weight = args.tensor("weight");
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
  m.def("cross_entropy_forward", &forward);
  m.def("cross_entropy_backward", &backward);
  m.def("cross_entropy_forward_workspace", &forward_workspace);
  m.def("cross_entropy_backward_workspace", &backward_workspace);
}

}  // namespace ofakern

// ops.routed_ffn: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "ops/routed_ffn/routed_ffn.h"
#include "tensor_caster.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr std::size_t kInputs = 7;  // what read_inputs takes, threads included

struct Call {
  RoutedLinearInputs inputs;
  int threads;
};

Call read_inputs(Arguments& args) {
  Call call;
  RoutedLinearInputs& in = call.inputs;
  in.x = args.tensor("x");
  in.weights = args.tensors("weights");
  in.biases = args.tensors("biases");
  const TensorView counts = args.tensor("counts");
  const Checker check("routed_ffn");
  check.dtype("counts", counts, {DType::i64});
  check.ndim("counts", counts, 1, "[E]");
  check.device("counts", counts, Device::cpu);
  check.contiguous("counts", counts);
  in.counts.assign(counts.as<const std::int64_t>(), counts.as<const std::int64_t>() + counts.numel());
  in.source = args.tensor("source");
  in.target = args.tensor("target");
  call.threads = args.threads();
  return call;
}

RoutedLinearGradients read_gradients(Arguments& args) {
  RoutedLinearGradients gradients;
  gradients.dx = args.tensor("dx");
  gradients.dweights = args.tensors("dweights");
  gradients.dbiases = args.tensors("dbiases");
  return gradients;
}

void forward(const py::args& values) {
  Arguments args("routed_ffn", values, 2 + kInputs);
  const TensorView y = args.tensor("y");
  const TensorView workspace = args.tensor("workspace");
  const Call call = read_inputs(args);
  const py::gil_scoped_release release;
  routed_linear_forward_cpu(call.inputs, y, workspace, call.threads);
}

void backward(const py::args& values) {
  Arguments args("routed_ffn", values, 5 + kInputs);
  const RoutedLinearGradients gradients = read_gradients(args);
  const TensorView workspace = args.tensor("workspace");
  const TensorView dy = args.tensor("dy");
  const Call call = read_inputs(args);
  const py::gil_scoped_release release;
  routed_linear_backward_cpu(call.inputs, dy, gradients, workspace, call.threads);
}

std::int64_t forward_workspace(const py::args& values) {
  Arguments args("routed_ffn", values, kInputs);
  const Call call = read_inputs(args);
  return routed_linear_forward_workspace(call.inputs, call.threads);
}

std::int64_t backward_workspace(const py::args& values) {
  Arguments args("routed_ffn", values, 3 + kInputs);
  const RoutedLinearGradients gradients = read_gradients(args);
  const Call call = read_inputs(args);
  return routed_linear_backward_workspace(call.inputs, gradients, call.threads);
}

}  // namespace

void bind_routed_ffn(py::module_& m) {
  m.def("routed_linear_forward", &forward);
  m.def("routed_linear_backward", &backward);
  m.def("routed_linear_forward_workspace", &forward_workspace);
  m.def("routed_linear_backward_workspace", &backward_workspace);
}

}  // namespace ofakern

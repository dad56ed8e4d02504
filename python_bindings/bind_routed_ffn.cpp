// ops.routed_ffn: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "ops/routed_ffn/routed_ffn.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

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
  in.counts = args.integers("counts");
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

py::object make_forward(const py::args& values) {
  Arguments args("routed_ffn", values, kInputs, Unready::copied);
  const Call call = read_inputs(args);
  const RoutedLinearInputs& in = call.inputs;
  const std::int64_t bytes = routed_linear_forward_workspace(in, call.threads);  // after its checks shapes are known
  Made made;
  const TensorView y = made.empty(in.x.dtype, {in.x.shape[0], in.weights[0].shape[0]}),
                   workspace = made.workspace(bytes);
  {
    const py::gil_scoped_release release;
    routed_linear_forward_cpu(in, y, workspace, call.threads);
  }
  return made.results();
}

// dx, E dweights, and with_bias E dbiases; a schema cannot return None: what is not wanted is a tensor without
// elements.
py::object make_backward(const py::args& values) {
  Arguments args("routed_ffn", values, 3 + 1 + kInputs, Unready::copied);
  const TensorView dy = args.tensor("dy");
  const Call call = read_inputs(args);
  const RoutedLinearInputs& in = call.inputs;
  const bool wants_x = args.flag("wants_x"), wants_weights = args.flag("wants_weights"),
             with_bias = args.flag("with_bias");
  RoutedLinearGradients gradients;
  Made made;
  const auto make = [&](const TensorView& like, bool wanted) {
    return wanted ? made.like(like) : made.empty(in.x.dtype, {0});
  };
  const TensorView dx = make(in.x, wants_x);
  if (wants_x) gradients.dx = dx;
  for (const TensorView& weight : in.weights) gradients.dweights.push_back(make(weight, wants_weights));
  if (with_bias)
    for (const TensorView& weight : in.weights)
      gradients.dbiases.push_back(made.empty(in.x.dtype, {wants_weights && weight.ndim > 0 ? weight.shape[0] : 0}));
  if (!wants_weights) {
    gradients.dweights.clear();
    gradients.dbiases.clear();
  }
  const TensorView workspace = made.workspace(routed_linear_backward_workspace(in, gradients, call.threads));
  {
    const py::gil_scoped_release release;
    routed_linear_backward_cpu(in, dy, gradients, workspace, call.threads);
  }
  return made.results();
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
  m.def("routed_linear", &make_forward);
  m.def("routed_linear_gradients", &make_backward);
  m.def("routed_linear_forward", &forward);
  m.def("routed_linear_backward", &backward);
  m.def("routed_linear_forward_workspace", &forward_workspace);
  m.def("routed_linear_backward_workspace", &backward_workspace);
}

}  // namespace ofakern

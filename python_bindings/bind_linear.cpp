// ops.linear: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "ops/linear/linear.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

void backward(const py::args& values) {
  Arguments args("linear", values, 6);
  const TensorView dweight = args.tensor("dweight"), dbias = args.tensor("dbias");
  const TensorView workspace = args.tensor("workspace");
  const TensorView dy = args.tensor("dy"), x = args.tensor("x");
  const int threads = args.threads();
  const py::gil_scoped_release release;
  linear_backward_cpu(dy, x, dweight, dbias, workspace, threads);
}

// With results that torch makes: dweight and dbias, without elements unless with_bias.
py::object make_gradients(const py::args& values) {
  Arguments args("linear", values, 4, Unready::copied);
  const TensorView dy = args.tensor("dy"), x = args.tensor("x");
  const bool with_bias = args.flag("with_bias");
  const int threads = args.threads();
  const std::int64_t bytes = linear_backward_workspace(dy, x, threads);  // after its checks shapes are known
  Made made;
  const TensorView dweight = made.empty(x.dtype, {dy.shape[1], x.shape[1]});
  const TensorView dbias = made.empty(x.dtype, {with_bias ? dy.shape[1] : 0});
  const TensorView workspace = made.workspace(bytes);
  {
    const py::gil_scoped_release release;
    linear_backward_cpu(dy, x, dweight, with_bias ? dbias : TensorView(), workspace, threads);
  }
  return made.results();
}

std::int64_t backward_workspace(const py::args& values) {
  Arguments args("linear", values, 3);
  const TensorView dy = args.tensor("dy"), x = args.tensor("x");
  return linear_backward_workspace(dy, x, args.threads());
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_gradients", &make_gradients);
  m.def("linear_backward", &backward);
  m.def("linear_backward_workspace", &backward_workspace);
}

}  // namespace ofakern

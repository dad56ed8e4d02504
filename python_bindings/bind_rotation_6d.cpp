// ops.rotation_6d: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "ops/rotation_6d/rotation_6d.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

void forward(const py::args& values) {
  Arguments args("rotation_6d", values, 3);
  const TensorView out = args.tensor("out"), x = args.tensor("x");
  const int threads = args.threads();
  const py::gil_scoped_release release;
  rotation_6d_forward_cpu(x, out, threads);
}

void backward(const py::args& values) {
  Arguments args("rotation_6d", values, 4);
  const TensorView dx = args.tensor("dx"), dout = args.tensor("dout"), x = args.tensor("x");
  const int threads = args.threads();
  const py::gil_scoped_release release;
  rotation_6d_backward_cpu(dout, x, dx, threads);
}

py::object make_forward(const py::args& values) {
  Arguments args("rotation_6d", values, 2, Unready::copied);
  const TensorView x = args.tensor("x");
  const int threads = args.threads();
  if (x.ndim < 1 || x.ndim >= kMaxDims)
    Checker("rotation_6d").fail_value("x", "be a tensor [..., 6] of at most 7 dimensions", describe(x));
  TensorView shape = x;  // [..., 3, 3]
  shape.shape[shape.ndim - 1] = 3;
  shape.shape[shape.ndim++] = 3;
  Made made;
  const TensorView out = made.like(shape);
  {
    const py::gil_scoped_release release;
    rotation_6d_forward_cpu(x, out, threads);
  }
  return made.results();
}

py::object make_backward(const py::args& values) {
  Arguments args("rotation_6d", values, 3, Unready::copied);
  const TensorView dout = args.tensor("dout"), x = args.tensor("x");
  const int threads = args.threads();
  Made made;
  const TensorView dx = made.like(x);
  {
    const py::gil_scoped_release release;
    rotation_6d_backward_cpu(dout, x, dx, threads);
  }
  return made.results();
}

}  // namespace

void bind_rotation_6d(py::module_& m) {
  m.def("rotation_6d", &make_forward);
  m.def("rotation_6d_gradient", &make_backward);
  m.def("rotation_6d_forward", &forward);
  m.def("rotation_6d_backward", &backward);
}

}  // namespace ofakern

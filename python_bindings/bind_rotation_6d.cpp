// ops.rotation_6d: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "ops/rotation_6d/rotation_6d.h"
#include "tensor_caster.h"

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

}  // namespace

void bind_rotation_6d(py::module_& m) {
  m.def("rotation_6d_forward", &forward);
  m.def("rotation_6d_backward", &backward);
}

}  // namespace ofakern

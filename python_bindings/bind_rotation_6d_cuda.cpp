// ops.rotation_6d on a GPU: arguments as in bind_rotation_6d.cpp, without the number of threads.
#include <pybind11/pybind11.h>

#include "cuda_call.h"
#include "cuda_ops.h"
#include "ops/rotation_6d/rotation_6d.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

py::object make_forward(const py::args& values) {
  Arguments args("rotation_6d", values, 1, Unready::copied);
  const TensorView x = args.tensor("x");
  const CudaCall call("rotation_6d", "x", x);
  if (x.ndim < 1 || x.ndim >= kMaxDims)
    Checker("rotation_6d").fail_value("x", "be a tensor [..., 6] of at most 7 dimensions", describe(x));
  TensorView shape = x;  // [..., 3, 3]
  shape.shape[shape.ndim - 1] = 3;
  shape.shape[shape.ndim++] = 3;
  Made made(x);
  const TensorView out = made.like(shape);
  {
    const py::gil_scoped_release release;
    rotation_6d_forward_cuda(x, out, call.stream());
  }
  return made.results();
}

py::object make_backward(const py::args& values) {
  Arguments args("rotation_6d", values, 2, Unready::copied);
  const TensorView dout = args.tensor("dout"), x = args.tensor("x");
  const CudaCall call("rotation_6d", "x", x);
  Made made(x);
  const TensorView dx = made.like(x);
  {
    const py::gil_scoped_release release;
    rotation_6d_backward_cuda(dout, x, dx, call.stream());
  }
  return made.results();
}

}  // namespace

void bind_rotation_6d_cuda(py::module_& m) {
  m.def("rotation_6d", &make_forward);
  m.def("rotation_6d_gradient", &make_backward);
}

}  // namespace ofakern

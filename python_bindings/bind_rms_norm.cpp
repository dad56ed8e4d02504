// ops.rms_norm: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include <algorithm>

#include "ops/rms_norm/rms_norm.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

void forward(const py::args& values) {
  Arguments args("rms_norm", values, 6);
  const TensorView out = args.tensor("out"), rstd = args.tensor("rstd");
  const TensorView x = args.tensor("x"), weight = args.tensor("weight");
  const double eps = args.real("eps");
  const int threads = args.threads();
  const py::gil_scoped_release release;
  rms_norm_forward_cpu(x, weight, eps, out, rstd, threads);
}

void backward(const py::args& values) {
  Arguments args("rms_norm", values, 8);
  const TensorView dx = args.tensor("dx"), dweight = args.tensor("dweight"), workspace = args.tensor("workspace");
  const TensorView dout = args.tensor("dout"), x = args.tensor("x");
  const TensorView rstd = args.tensor("rstd"), weight = args.tensor("weight");
  const int threads = args.threads();
  const py::gil_scoped_release release;
  rms_norm_backward_cpu(dout, x, rstd, weight, dx, dweight, workspace, threads);
}

// ---- with results that torch makes; sizes come from arguments that the op has not checked yet ----------------------

std::int64_t width_of(const TensorView& x) { return x.ndim < 1 ? 1 : std::max<std::int64_t>(x.shape[x.ndim - 1], 1); }

py::object make_forward(const py::args& values) {
  Arguments args("rms_norm", values, 5, Unready::copied);
  const TensorView x = args.tensor("x"), weight = args.tensor("weight");
  const double eps = args.real("eps");
  const int threads = args.threads();
  const bool keeps_rstd = args.flag("keeps_rstd");  // else no gradient will read it: None among the results
  const std::int64_t rows = x.numel() / width_of(x);
  Made made;
  const TensorView out = made.like(x);
  if (!keeps_rstd) made.none();
  const TensorView rstd = keeps_rstd
                              ? made.empty(DType::f32, {rows})
                              : row_major_view(made.workspace(rows * size_of(DType::f32)).data, DType::f32, {rows});
  {
    const py::gil_scoped_release release;
    rms_norm_forward_cpu(x, weight, eps, out, rstd, threads);
  }
  return made.results();
}

py::object make_gradients(const py::args& values) {
  Arguments args("rms_norm", values, 5, Unready::copied);
  const TensorView dout = args.tensor("dout"), x = args.tensor("x");
  const TensorView rstd = args.tensor("rstd"), weight = args.tensor("weight");
  const int threads = args.threads();
  Made made;
  const TensorView dx = made.like(x), dweight = made.like(weight);
  const std::int64_t width = width_of(x);
  const TensorView workspace = made.workspace(rms_norm_backward_workspace(x.numel() / width, width));
  {
    const py::gil_scoped_release release;
    rms_norm_backward_cpu(dout, x, rstd, weight, dx, dweight, workspace, threads);
  }
  return made.results();
}

}  // namespace

void bind_rms_norm(py::module_& m) {
  m.def("rms_norm", &make_forward);
  m.def("rms_norm_gradients", &make_gradients);
  m.def("rms_norm_forward", &forward);
  m.def("rms_norm_backward", &backward);
  m.def("rms_norm_backward_workspace", &rms_norm_backward_workspace);
}

}  // namespace ofakern

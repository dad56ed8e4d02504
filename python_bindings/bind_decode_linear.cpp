// ops.decode_linear: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "ops/decode_linear/decode_linear.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr std::size_t kInputs = 5;  // what read_inputs takes, threads included

DecodeLinearInputs read_inputs(Arguments& args) {
  DecodeLinearInputs in;
  in.x = args.rows("x");
  in.packed = args.tensor("packed");
  in.scale = args.tensor("scale");
  in.bias = args.tensor("bias");
  return in;
}

// `like` carries the dtype of x.
std::int64_t packed_bytes(const py::args& values) {
  Arguments args("decode_linear", values, 2);
  const TensorView weight = args.tensor("weight"), like = args.tensor("like");
  const Checker check("decode_linear");
  check.given("weight", weight);
  check.ndim("weight", weight, 2, "[N, K]");
  check.given("like", like);
  check.dtype("like", like, {DType::f32, DType::bf16, DType::f16});
  return decode_linear_packed_bytes(weight.shape[0], weight.shape[1], like.dtype, weight.dtype == DType::u8);
}

void pack(const py::args& values) {
  Arguments args("decode_linear", values, 4);
  const TensorView packed = args.tensor("packed"), weight = args.tensor("weight"), like = args.tensor("like");
  const int threads = args.threads();
  const Checker check("decode_linear");
  check.given("like", like);
  check.dtype("like", like, {DType::f32, DType::bf16, DType::f16});
  const py::gil_scoped_release release;
  decode_linear_pack(weight, like.dtype, packed, threads);
}

std::int64_t workspace_bytes(const py::args& values) {
  Arguments args("decode_linear", values, kInputs);
  const DecodeLinearInputs in = read_inputs(args);
  return decode_linear_workspace(in, args.threads());
}

void forward(const py::args& values) {
  Arguments args("decode_linear", values, 2 + kInputs);
  const TensorView out = args.tensor("out"), workspace = args.tensor("workspace");
  const DecodeLinearInputs in = read_inputs(args);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  decode_linear_cpu(in, out, workspace, threads);
}

py::object make_forward(const py::args& values) {
  Arguments args("decode_linear", values, 1 + kInputs, Unready::copied);
  const DecodeLinearInputs in = read_inputs(args);
  const std::int64_t width = args.integer("width");
  const int threads = args.threads();
  const std::int64_t bytes = decode_linear_workspace(in, threads);  // after its checks x has 2 dimensions
  Made made;
  const TensorView out = made.empty(in.x.dtype, {in.x.shape[0], width}), workspace = made.workspace(bytes);
  {
    const py::gil_scoped_release release;
    decode_linear_cpu(in, out, workspace, threads);
  }
  return made.results();
}

}  // namespace

void bind_decode_linear(py::module_& m) {
  m.def("decode_linear_packed_bytes", &packed_bytes);
  m.def("decode_linear_pack", &pack);
  m.def("decode_linear", &make_forward);
  m.def("decode_linear_workspace", &workspace_bytes);
  m.def("decode_linear_forward", &forward);
}

}  // namespace ofakern

// ops.gathered_linear: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "ops/gathered_linear/gathered_linear.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

GatheredLinearInputs read_inputs(Arguments& args) {
  GatheredLinearInputs in;
  in.hidden = args.rows("hidden");
  in.weight = args.rows("weight");
  in.states = args.tensor("states");
  in.first = args.tensor("first");
  in.tokens = args.tensor("tokens");
  return in;
}

std::int64_t count(const py::args& values) {
  Arguments args("gathered_linear", values, 2);
  const TensorView states = args.tensor("states"), first = args.tensor("first");
  return gathered_linear_count(states, first);
}

std::int64_t workspace_bytes(const py::args& values) {
  Arguments args("gathered_linear", values, 5);
  return gathered_linear_workspace(read_inputs(args));
}

void forward(const py::args& values) {
  Arguments args("gathered_linear", values, 10);
  const TensorView out = args.tensor("values"), row_first = args.tensor("row_first");
  const TensorView row_tokens = args.tensor("row_tokens"), workspace = args.tensor("workspace");
  const GatheredLinearInputs in = read_inputs(args);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  gathered_linear_cpu(in, out, row_first, row_tokens, workspace, threads);
}

py::object make_forward(const py::args& values) {
  Arguments args("gathered_linear", values, 6, Unready::copied);
  const GatheredLinearInputs in = read_inputs(args);
  const int threads = args.threads();
  const std::int64_t bytes = gathered_linear_workspace(in);  // with the checks of all that is read below
  const std::int64_t count = gathered_linear_count(in.states, in.first);
  Made made;
  const TensorView out = made.empty(DType::f32, {count});
  const TensorView row_first = made.empty(DType::i32, {in.states.shape[0] + 1});
  const TensorView row_tokens = made.empty(DType::i32, {count});
  const TensorView workspace = made.workspace(bytes);
  {
    const py::gil_scoped_release release;
    gathered_linear_cpu(in, out, row_first, row_tokens, workspace, threads);
  }
  return made.results();
}

}  // namespace

void bind_gathered_linear(py::module_& m) {
  m.def("gathered_linear", &make_forward);
  m.def("gathered_linear_count", &count);
  m.def("gathered_linear_workspace", &workspace_bytes);
  m.def("gathered_linear_forward", &forward);
}

}  // namespace ofakern

// ops.gathered_linear: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "ops/gathered_linear/gathered_linear.h"
#include "tensor_caster.h"

namespace py = pybind11;

namespace ofakern {
namespace {

GatheredLinearInputs read_inputs(Arguments& args) {
  GatheredLinearInputs in;
  in.hidden = args.tensor("hidden");
  in.weight = args.tensor("weight");
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

}  // namespace

void bind_gathered_linear(py::module_& m) {
  m.def("gathered_linear_count", &count);
  m.def("gathered_linear_workspace", &workspace_bytes);
  m.def("gathered_linear_forward", &forward);
}

}  // namespace ofakern

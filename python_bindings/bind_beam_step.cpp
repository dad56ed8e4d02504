// ops.beam_step: every argument becomes a checked view with the GIL held, the kernels run without it.
#include <pybind11/pybind11.h>

#include "beam_step_arguments.h"
#include "ops/beam_step/beam_step.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

std::int64_t beam_workspace(const py::args& values) {
  Arguments args("beam_step", values, kStepArguments + 4);
  const BeamInputs in = read_beams(args);
  const std::int64_t width = args.integer("width");
  return beam_step_workspace(in, width, args.threads());
}

std::int64_t beam(const py::args& values) {
  Arguments args("beam_step", values, 5 + kStepArguments + 3);
  const BeamOutputs out = read_beam_outputs(args);
  const TensorView workspace = args.tensor("workspace");
  const BeamInputs in = read_beams(args);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  return beam_step_cpu(in, out, workspace, threads);
}

std::int64_t sample_workspace(const py::args& values) {
  Arguments args("sample_step", values, kStepArguments + 6);
  const SampleInputs in = read_samples(args);
  return sample_step_workspace(in, args.threads());
}

std::int64_t sample(const py::args& values) {
  Arguments args("sample_step", values, 3 + kStepArguments + 6);
  const TensorView tokens = args.tensor("tokens"), log_probs = args.tensor("log_probs");
  const TensorView workspace = args.tensor("workspace");
  const SampleInputs in = read_samples(args);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  return sample_step_cpu(in, tokens, log_probs, workspace, threads);
}

// (results, status)
py::tuple make_beam(const py::args& values) {
  Arguments args("beam_step", values, kStepArguments + 4, Unready::copied);
  const BeamInputs in = read_beams(args);
  const std::int64_t width = args.integer("width");
  const int threads = args.threads();
  const std::int64_t bytes = beam_step_workspace(in, width, threads);  // with the checks of all that is read below
  const std::int64_t batch = in.row_offsets.shape[0] - 1;
  Made made;
  BeamOutputs out;
  out.scores = made.empty(DType::f32, {batch, width});
  out.origins = made.empty(DType::i32, {batch, width});
  out.tokens = made.empty(DType::i32, {batch, width});
  out.log_probs = made.empty(DType::f32, {batch, width});
  const TensorView workspace = made.workspace(bytes);
  std::int64_t status;
  {
    const py::gil_scoped_release release;
    status = beam_step_cpu(in, out, workspace, threads);
  }
  return py::make_tuple(made.results(), status);
}

py::tuple make_sample(const py::args& values) {
  Arguments args("sample_step", values, kStepArguments + 6, Unready::copied);
  const SampleInputs in = read_samples(args);
  const int threads = args.threads();
  const std::int64_t bytes = sample_step_workspace(in, threads);
  const std::int64_t rows = in.uniforms.shape[0];
  Made made;
  const TensorView tokens = made.empty(DType::i32, {rows}), log_probs = made.empty(DType::f32, {rows});
  const TensorView workspace = made.workspace(bytes);
  std::int64_t status;
  {
    const py::gil_scoped_release release;
    status = sample_step_cpu(in, tokens, log_probs, workspace, threads);
  }
  return py::make_tuple(made.results(), status);
}

}  // namespace

void bind_beam_step(py::module_& m) {
  m.def("beam_step_workspace", &beam_workspace);
  m.def("beam_step", &make_beam);
  m.def("beam_step_forward", &beam);
  m.def("sample_step_workspace", &sample_workspace);
  m.def("sample_step", &make_sample);
  m.def("sample_step_forward", &sample);
}

}  // namespace ofakern

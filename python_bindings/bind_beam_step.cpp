// ops.beam_step: every argument becomes a checked view with the GIL held, the kernels run without it.
#include <pybind11/pybind11.h>

#include "ops/beam_step/beam_step.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr std::size_t kStep = 26;  // what read_step takes

StepInputs read_step(Arguments& args) {
  StepInputs in;
  in.logits = args.rows("logits");
  in.first = args.tensor("first");
  in.tokens = args.tensor("tokens");
  in.temperature = args.tensor("temperature");
  in.live = args.tensor("live");
  in.forced = args.tensor("forced");
  in.no_eos = args.tensor("no_eos");
  in.repetition = args.tensor("repetition_penalty");
  in.history = args.rows("history");
  in.counted_from = args.tensor("counted_from");
  in.ngram = args.tensor("ngram");
  in.unk_penalty = args.tensor("unk_penalty");
  in.adjust_first = args.tensor("adjust_first");
  in.adjust_tokens = args.tensor("adjust_tokens");
  in.adjust_values = args.tensor("adjust_values");
  in.states = args.tensor("states");
  in.state_first = args.tensor("tables.first");
  in.state_tokens = args.tensor("tables.tokens");
  in.range_first = args.tensor("tables.range_first");
  in.ranges = args.tensor("tables.ranges");
  in.renormalise = args.tensor("tables.renormalise");
  in.free = args.tensor("tables.free");
  in.vocabulary = args.integer("vocabulary");
  in.pad = args.integer("pad");
  in.eos = args.integer("eos");
  in.unk = args.integer("unk");
  return in;
}

BeamInputs read_beams(Arguments& args) {
  BeamInputs in;
  in.step = read_step(args);
  in.sums = args.tensor("sums");
  in.row_offsets = args.tensor("row_offsets");
  return in;
}

SampleInputs read_samples(Arguments& args) {
  SampleInputs in;
  in.step = read_step(args);
  in.uniforms = args.tensor("uniforms");
  in.top_k = args.tensor("top_k");
  in.top_p = args.tensor("top_p");
  in.typical_p = args.tensor("typical_p");
  in.min_p = args.tensor("min_p");
  return in;
}

std::int64_t beam_workspace(const py::args& values) {
  Arguments args("beam_step", values, kStep + 4);
  const BeamInputs in = read_beams(args);
  const std::int64_t width = args.integer("width");
  return beam_step_workspace(in, width, args.threads());
}

std::int64_t beam(const py::args& values) {
  Arguments args("beam_step", values, 5 + kStep + 3);
  BeamOutputs out;
  out.scores = args.tensor("scores");
  out.origins = args.tensor("origins");
  out.tokens = args.tensor("tokens");
  out.log_probs = args.tensor("log_probs");
  const TensorView workspace = args.tensor("workspace");
  const BeamInputs in = read_beams(args);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  return beam_step_cpu(in, out, workspace, threads);
}

std::int64_t sample_workspace(const py::args& values) {
  Arguments args("sample_step", values, kStep + 6);
  const SampleInputs in = read_samples(args);
  return sample_step_workspace(in, args.threads());
}

std::int64_t sample(const py::args& values) {
  Arguments args("sample_step", values, 3 + kStep + 6);
  const TensorView tokens = args.tensor("tokens"), log_probs = args.tensor("log_probs");
  const TensorView workspace = args.tensor("workspace");
  const SampleInputs in = read_samples(args);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  return sample_step_cpu(in, tokens, log_probs, workspace, threads);
}

// (results, status)
py::tuple make_beam(const py::args& values) {
  Arguments args("beam_step", values, kStep + 4, Unready::copied);
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
  Arguments args("sample_step", values, kStep + 6, Unready::copied);
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

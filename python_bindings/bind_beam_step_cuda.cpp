// ops.beam_step and sample_step on a GPU: the arguments of bind_beam_step.cpp without the number of threads; beam_step
// takes `arrived`, zeros, as its last one.
#include <pybind11/pybind11.h>

#include "beam_step_arguments.h"
#include "cuda_call.h"
#include "cuda_ops.h"
#include "ops/beam_step/beam_step.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr Checker kBeams("beam_step"), kSamples("sample_step");

void check_beams(const BeamInputs& in, std::int64_t width, const TensorView& arrived) {
  check_beam_step_cuda(in, width);
  kBeams.plain("arrived", arrived, "[B or more]", {-1}, DType::i32);
  kBeams.that(arrived.shape[0] >= in.row_offsets.shape[0] - 1, "arrived", "have an entry per sample",
              describe(arrived));
}

std::int64_t beam_workspace(const py::args& values) {
  Arguments args("beam_step", values, kStepArguments + 3);
  const BeamInputs in = read_beams(args);
  const CudaCall call("beam_step", "logits", in.step.logits);
  check_beam_step_cuda(in, args.integer("width"));
  return beam_step_workspace_cuda(in);
}

void run(const BeamInputs& in, const BeamOutputs& out, const TensorView& arrived, const TensorView& workspace,
         Stream stream) {
  const py::gil_scoped_release release;
  beam_step_cuda(in, out, arrived, workspace, stream);
}

void beam(const py::args& values) {
  Arguments args("beam_step", values, 5 + kStepArguments + 3);
  const BeamOutputs out = read_beam_outputs(args);
  const TensorView workspace = args.tensor("workspace");
  const BeamInputs in = read_beams(args);
  const TensorView arrived = args.tensor("arrived");
  const CudaCall call("beam_step", "logits", in.step.logits);
  check_beam_step_results(in, out);
  check_beams(in, out.scores.shape[1], arrived);
  kBeams.workspace("workspace", workspace, beam_step_workspace_cuda(in));
  run(in, out, arrived, workspace, call.stream());
}

py::object make_beam(const py::args& values) {
  Arguments args("beam_step", values, kStepArguments + 4, Unready::copied);
  const BeamInputs in = read_beams(args);
  const std::int64_t width = args.integer("width");
  const TensorView arrived = args.tensor("arrived");
  const CudaCall call("beam_step", "logits", in.step.logits);
  check_beams(in, width, arrived);
  const std::int64_t batch = in.row_offsets.shape[0] - 1;
  Made made(in.step.logits);
  BeamOutputs out;
  out.scores = made.empty(DType::f32, {batch, width});
  out.origins = made.empty(DType::i32, {batch, width});
  out.tokens = made.empty(DType::i32, {batch, width});
  out.log_probs = made.empty(DType::f32, {batch, width});
  run(in, out, arrived, made.workspace(beam_step_workspace_cuda(in)), call.stream());
  return made.results();
}

py::object make_sample(const py::args& values) {
  Arguments args("sample_step", values, kStepArguments + 5, Unready::copied);
  const SampleInputs in = read_samples(args);
  const CudaCall call("sample_step", "logits", in.step.logits);
  check_sample_step(in);
  const std::int64_t rows = in.uniforms.shape[0];
  Made made(in.step.logits);
  const TensorView tokens = made.empty(DType::i32, {rows}), log_probs = made.empty(DType::f32, {rows});
  const TensorView workspace = made.workspace(sample_step_workspace_cuda(in));
  {
    const py::gil_scoped_release release;
    sample_step_cuda(in, tokens, log_probs, workspace, call.stream());
  }
  return made.results();
}

}  // namespace

void bind_beam_step_cuda(py::module_& m) {
  m.def("beam_step", &make_beam);
  m.def("beam_step_workspace", &beam_workspace);
  m.def("beam_step_forward", &beam);
  m.def("sample_step", &make_sample);
}

}  // namespace ofakern

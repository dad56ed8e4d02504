// Checks every argument (beam_step_check.cpp), then calls the active instruction set's kernel.
#include "ops/beam_step/beam_step.h"

#include "core/check.h"
#include "core/isa.h"

namespace ofakern {

OFAKERN_DECLARE_FOR_EACH_ISA(std::int64_t beam_step_workspace(const BeamInputs& in, std::int64_t width, int threads);
                             std::int64_t beam_step(const BeamInputs& in, const BeamOutputs& out, void* workspace,
                                                    int threads);
                             std::int64_t sample_step_workspace(const SampleInputs& in, int threads);
                             std::int64_t sample_step(const SampleInputs& in, const TensorView& tokens,
                                                      const TensorView& log_probs, void* workspace, int threads);)

namespace {

constexpr Checker kBeams("beam_step"), kSamples("sample_step");

}  // namespace

std::int64_t beam_step_workspace(const BeamInputs& in, std::int64_t width, int threads) {
  check_beam_step(in, width);
  return OFAKERN_DISPATCH(beam_step_workspace, in, width, threads);
}

std::int64_t sample_step_workspace(const SampleInputs& in, int threads) {
  check_sample_step(in);
  return OFAKERN_DISPATCH(sample_step_workspace, in, threads);
}

std::int64_t beam_step_cpu(const BeamInputs& in, const BeamOutputs& out, const TensorView& workspace, int threads) {
  check_beam_step_results(in, out);
  kBeams.workspace("workspace", workspace, beam_step_workspace(in, out.scores.shape[1], threads));
  return OFAKERN_DISPATCH(beam_step, in, out, workspace.data, threads);
}

std::int64_t sample_step_cpu(const SampleInputs& in, const TensorView& tokens, const TensorView& log_probs,
                             const TensorView& workspace, int threads) {
  kSamples.workspace("workspace", workspace, sample_step_workspace(in, threads));
  check_sample_step_results(in, tokens, log_probs);
  return OFAKERN_DISPATCH(sample_step, in, tokens, log_probs, workspace.data, threads);
}

}  // namespace ofakern

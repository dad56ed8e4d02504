// A call's arguments in the order of the ops' schema, for the CPU's binding and the GPU's.
#pragma once

#include "ops/beam_step/beam_step.h"
#include "tensor_caster.h"

namespace ofakern {

constexpr std::size_t kStepArguments = 26;  // what read_step takes

inline StepInputs read_step(Arguments& args) {
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

inline BeamInputs read_beams(Arguments& args) {
  BeamInputs in;
  in.step = read_step(args);
  in.sums = args.tensor("sums");
  in.row_offsets = args.tensor("row_offsets");
  return in;
}

inline SampleInputs read_samples(Arguments& args) {
  SampleInputs in;
  in.step = read_step(args);
  in.uniforms = args.tensor("uniforms");
  in.top_k = args.tensor("top_k");
  in.top_p = args.tensor("top_p");
  in.typical_p = args.tensor("typical_p");
  in.min_p = args.tensor("min_p");
  return in;
}

inline BeamOutputs read_beam_outputs(Arguments& args) {
  BeamOutputs out;
  out.scores = args.tensor("scores");
  out.origins = args.tensor("origins");
  out.tokens = args.tensor("tokens");
  out.log_probs = args.tensor("log_probs");
  return out;
}

}  // namespace ofakern

// Checks every argument against the contract in beam_step.h, for all of its backends.
#include <string>

#include "core/check.h"
#include "ops/beam_step/beam_step.h"

namespace ofakern {
namespace {

// The checks of one op, in the words of its caller.
class Room {
 public:
  constexpr explicit Room(const char* where) : check_(where) {}

  void optional(const char* argument, const TensorView& x, DType dtype, const char* letters, std::int64_t size) const {
    if (x.defined()) check_.plain(argument, x, letters, {size}, dtype);
  }

  // Returns R.
  std::int64_t step(const StepInputs& in) const {
    check_.given("logits", in.logits);
    check_.dtype("logits", in.logits, {DType::f32, DType::bf16, DType::f16});
    check_.device("logits", in.logits);
    check_.last_contiguous("logits", in.logits);
    check_.that(in.vocabulary >= 0 && in.vocabulary < INT32_MAX, "vocabulary", "be in 0..2**31 - 2",
                std::to_string(in.vocabulary));
    const std::int64_t rows = in.first.defined() ? ragged_rows(in) : in.logits.shape[0];
    if (!in.first.defined()) check_.shape("logits", in.logits, "[R, V]", {-1, in.vocabulary});
    optional("temperature", in.temperature, DType::f32, "[R]", rows);
    optional("live", in.live, DType::u8, "[R]", rows);
    optional("forced", in.forced, DType::i32, "[R]", rows);
    optional("no_eos", in.no_eos, DType::u8, "[R]", rows);
    optional("repetition_penalty", in.repetition, DType::f32, "[R]", rows);
    optional("counted_from", in.counted_from, DType::i32, "[R]", rows);
    optional("ngram", in.ngram, DType::i32, "[R]", rows);
    optional("unk_penalty", in.unk_penalty, DType::f32, "[R]", rows);
    history(in, rows);
    adjustments(in, rows);
    automaton(in, rows);
    return rows;
  }

  void offsets(const TensorView& offsets) const {
    check_.plain("row_offsets", offsets, "[B + 1]", {-1}, DType::i32);
    check_.that(offsets.shape[0] >= 1, "row_offsets", "have shape [B + 1]", describe(offsets));
  }

  // Runs of rows, in order, inside the rows that there are.
  void ascending(const TensorView& offsets, std::int64_t rows) const {
    std::int64_t before = 0;
    for (std::int64_t b = 0; b < offsets.shape[0]; ++b) {
      const std::int64_t here = offsets.as<const std::int32_t>()[b];
      check_.that(here >= before && here <= rows, "row_offsets", "ascend within 0.." + std::to_string(rows),
                  std::to_string(here) + " at " + std::to_string(b));
      before = here;
    }
  }

  const Checker& check() const { return check_; }

 private:
  std::int64_t ragged_rows(const StepInputs& in) const {
    check_.shape("logits", in.logits, "[n]", {-1});
    check_.plain("first", in.first, "[R + 1]", {-1}, DType::i32);
    check_.that(in.first.shape[0] >= 1, "first", "have shape [R + 1]", describe(in.first));
    check_.plain("tokens", in.tokens, "[n]", {in.logits.shape[0]}, DType::i32);
    check_.absent("states", in.states, "the logits are ragged");
    return in.first.shape[0] - 1;
  }

  void history(const StepInputs& in, std::int64_t rows) const {
    if (in.history.defined()) {
      check_.dtype("history", in.history, {DType::i32});
      check_.shape("history", in.history, "[R, t]", {rows, -1});
      check_.device("history", in.history);
      check_.last_contiguous("history", in.history);
    } else {
      check_.absent("ngram", in.ngram, "there is no history");
      check_.absent("repetition_penalty", in.repetition, "there is no history");
    }
  }

  void adjustments(const StepInputs& in, std::int64_t rows) const {
    if (!in.adjust_first.defined()) {
      check_.absent("adjust_tokens", in.adjust_tokens, "there is no adjust_first");
      check_.absent("adjust_values", in.adjust_values, "there is no adjust_first");
      return;
    }
    check_.plain("adjust_first", in.adjust_first, "[R + 1]", {rows + 1}, DType::i32);
    check_.plain("adjust_tokens", in.adjust_tokens, "[n]", {-1}, DType::i32);
    check_.plain("adjust_values", in.adjust_values, "[n]", {in.adjust_tokens.shape[0]}, DType::f32);
  }

  void automaton(const StepInputs& in, std::int64_t rows) const {
    if (!in.states.defined()) {
      check_.absent("tables", in.renormalise, "there are no states");
      return;
    }
    check_.plain("states", in.states, "[R]", {rows}, DType::i32);
    check_.plain("tables.renormalise", in.renormalise, "[S]", {-1}, DType::u8);
    const std::int64_t states = in.renormalise.shape[0];
    check_.plain("tables.free", in.free, "[S]", {states}, DType::u8);
    check_.plain("tables.first", in.state_first, "[S + 1]", {states + 1}, DType::i32);
    check_.plain("tables.tokens", in.state_tokens, "[E]", {-1}, DType::i32);
    check_.plain("tables.range_first", in.range_first, "[S + 1]", {states + 1}, DType::i32);
    check_.plain("tables.ranges", in.ranges, "[Q, 3]", {-1, 3}, DType::i32);
  }

  Checker check_;
};

constexpr Room kBeams("beam_step"), kSamples("sample_step");

// Returns R.
std::int64_t check_beam_tensors(const BeamInputs& in, std::int64_t width, std::int64_t widest) {
  const std::int64_t rows = kBeams.step(in.step);
  kBeams.check().plain("sums", in.sums, "[R]", {rows}, DType::f32);
  kBeams.offsets(in.row_offsets);
  kBeams.check().that(width >= 1 && width <= widest, "width", "be in 1.." + std::to_string(widest),
                      std::to_string(width));
  return rows;
}

}  // namespace

void check_beam_step(const BeamInputs& in, std::int64_t width) {
  kBeams.ascending(in.row_offsets, check_beam_tensors(in, width, 65536));
}

void check_beam_step_cuda(const BeamInputs& in, std::int64_t width) {
  const std::int64_t rows = check_beam_tensors(in, width, kMostWideCuda);
  kBeams.check().that(rows * in.step.vocabulary <= UINT32_MAX, "logits", "have fewer than 2**32 entries",
                      describe(in.step.logits));
}

void check_beam_step_results(const BeamInputs& in, const BeamOutputs& out) {
  const std::int64_t batch = in.row_offsets.ndim == 1 ? in.row_offsets.shape[0] - 1 : -1;
  kBeams.check().plain("scores", out.scores, "[B, width]", {batch, -1}, DType::f32);
  const std::int64_t width = out.scores.shape[1];
  kBeams.check().plain("origins", out.origins, "[B, width]", {batch, width}, DType::i32);
  kBeams.check().plain("tokens", out.tokens, "[B, width]", {batch, width}, DType::i32);
  kBeams.check().plain("log_probs", out.log_probs, "[B, width]", {batch, width}, DType::f32);
}

void check_sample_step(const SampleInputs& in) {
  const std::int64_t rows = kSamples.step(in.step);
  kSamples.check().plain("uniforms", in.uniforms, "[R]", {rows}, DType::f32);
  kSamples.optional("top_k", in.top_k, DType::i32, "[R]", rows);
  kSamples.optional("top_p", in.top_p, DType::f32, "[R]", rows);
  kSamples.optional("typical_p", in.typical_p, DType::f32, "[R]", rows);
  kSamples.optional("min_p", in.min_p, DType::f32, "[R]", rows);
}

void check_sample_step_results(const SampleInputs& in, const TensorView& tokens, const TensorView& log_probs) {
  kSamples.check().plain("tokens", tokens, "[R]", {in.uniforms.shape[0]}, DType::i32);
  kSamples.check().plain("log_probs", log_probs, "[R]", {in.uniforms.shape[0]}, DType::f32);
}

}  // namespace ofakern

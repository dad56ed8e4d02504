// One step of a search: from logits to the best continuations of every sample, or to one drawn token per row.
//
//   x[r, v]   = pen(logits[r, v]) / temperature[r]       pen: repetition penalty on the tokens of the row's history
//   p[r, v]   = x[r, v] - log sum over v' in N(r) of exp(x[r, v'])
//   p         -= unk_penalty at unk;  += adjustments;  = -inf where banned or not allowed
//   score     = sums[r] + p[r, v]                        best first; ties: smaller row, then smaller token
//
// N(r): the whole row; what the automaton's state allows where the state is renormalised; the given tokens of a ragged
// row. The difference p is taken in f64 and rounded once; everything behind it is f32. Rows are never written.
//
// Any tensor but `logits` may be undefined where ofakern/ops/beam_step/rules.py says that a rule may be left out; that
// page tells what each one means. Indices inside tensors (tokens, offsets, states) are checked or ignored, never
// followed out of bounds. Derivation, layout and measurements: README.md beside this file.
#pragma once

#include <cstdint>

#include "core/stream.h"
#include "core/tensor_view.h"

namespace ofakern {

struct StepInputs {
  TensorView logits;         // [R, V] f32, bf16 or f16, rows contiguous; or [n] with `first` and `tokens`
  TensorView first, tokens;  // i32 [R + 1], i32 [n]
  TensorView temperature;    // f32 [R]
  TensorView live;           // u8 [R]
  TensorView forced;         // i32 [R]
  TensorView no_eos;         // u8 [R]
  TensorView repetition;     // f32 [R]
  TensorView history;        // i32 [R, t], rows contiguous
  TensorView counted_from;   // i32 [R]
  TensorView ngram;          // i32 [R]
  TensorView unk_penalty;    // f32 [R]
  TensorView adjust_first, adjust_tokens, adjust_values;  // i32 [R + 1], i32 [n], f32 [n]
  TensorView states;                                      // i32 [R]
  TensorView state_first, state_tokens;                   // i32 [S + 1], i32 [E]
  TensorView range_first, ranges;                         // i32 [S + 1], i32 [Q, 3]
  TensorView renormalise, free;                           // u8 [S]
  std::int64_t vocabulary = 0;
  std::int64_t pad = -1, eos = -1, unk = -1;
};

struct BeamInputs {
  StepInputs step;
  TensorView sums;         // f32 [R]
  TensorView row_offsets;  // i32 [B + 1]
};

struct BeamOutputs {
  TensorView scores, origins, tokens, log_probs;  // f32, i32, i32, f32 [B, width]
};

struct SampleInputs {
  StepInputs step;
  TensorView uniforms;                        // f32 [R]
  TensorView top_k, top_p, typical_p, min_p;  // i32, f32, f32, f32 [R]
};

// What is wrong with a row, in the kernels' result: kRowFaults * row + fault, or -1.
enum RowFault : std::int64_t { kBadLogits = 0, kBadSum = 1, kBadState = 2, kRowFaults = 4 };

// Throw on the first broken rule.
void check_beam_step(const BeamInputs& inputs, std::int64_t width);
void check_beam_step_results(const BeamInputs& inputs, const BeamOutputs& out);
void check_sample_step(const SampleInputs& inputs);
void check_sample_step_results(const SampleInputs& inputs, const TensorView& tokens, const TensorView& log_probs);

std::int64_t beam_step_workspace(const BeamInputs& inputs, std::int64_t width, int threads);
std::int64_t sample_step_workspace(const SampleInputs& inputs, int threads);

// Outputs are contiguous and fully written unless a row is at fault. No result depends on `threads`.
std::int64_t beam_step_cpu(const BeamInputs& inputs, const BeamOutputs& out, const TensorView& workspace, int threads);
// tokens i32 [R], log_probs f32 [R].
std::int64_t sample_step_cpu(const SampleInputs& inputs, const TensorView& tokens, const TensorView& log_probs,
                             const TensorView& workspace, int threads);

// On a GPU nothing waits for the result, so faults stand in it: a sample with a row at fault has NaN scores and
// log_probs, the row (counted in the sample) as origins and -2 - fault as tokens, in all its places; a row of
// sample_step NaN and -2 - fault. row_offsets that do not ascend: fault 3 in all samples. At most kMostWideCuda
// candidates, and rows * vocabulary below 2^32. arrived: i32 [B] or more, zeros before the call and after it.
constexpr std::int64_t kMostWideCuda = 1024;
void check_beam_step_cuda(const BeamInputs& inputs, std::int64_t width);
std::int64_t beam_step_workspace_cuda(const BeamInputs& inputs);
void beam_step_cuda(const BeamInputs& inputs, const BeamOutputs& out, const TensorView& arrived,
                    const TensorView& workspace, Stream stream);
std::int64_t sample_step_workspace_cuda(const SampleInputs& inputs);
void sample_step_cuda(const SampleInputs& inputs, const TensorView& tokens, const TensorView& log_probs,
                      const TensorView& workspace, Stream stream);

}  // namespace ofakern

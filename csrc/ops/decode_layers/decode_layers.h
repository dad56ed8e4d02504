// All layers of a decoder over one token of every row: the contract. Layer l, on x [R, D] (T rounds to x's dtype):
//
//   seen = first ? norm(x, own_norm) : x                                     first: norms stand before the sub-layers
//   q, k, v = own(seen);   k and v go into the layer's slots[r]
//   x, seen = join(own_out(attend(q, own keys by table, own_bias[l])), x, own_norm, cross_norm, own_extra)
//   x, seen = join(cross_out(attend(cross(seen), source keys, cross_bias)), x, cross_norm, final_norm, cross_extra)
//   y = fc2(norm(activation(fc1(seen)), ffn_norm))
//   x = first ? T(residual(x) + y) : norm(residual(x) + y, final_norm)       residual(x) = T(x * residual[l])
//
//   join(y, x, own, next, extra): total = T(x + norm(y, extra)); first ? (total, norm(total, next))
//                                 : (norm(total, own), the same)
//
// and out = norm(x, finish) of the last layer's. Every arrow rounds to x's dtype; sums are f32. Projections are those
// of decode_linear, attention is decode_attention's, norms are layer_norm's: the bits are theirs too. A norm without a
// weight, a residual or a head scale that is undefined is left out.
//
// The threads stay together for the whole call (core/team.h). Work, bytes, what limits it: README.md beside this file.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace ofakern {

// One product's weight as decode_linear takes it.
struct StepProjection {
  TensorView packed, scale, bias;
};

struct StepNorm {
  TensorView weight, bias;  // f32 [D]; both undefined where there is no such norm
  double eps;
};

// What stays the same from step to step.
struct StepLayer {
  StepProjection own, own_out, cross, cross_out, fc1, fc2;  // own: query, key and value, one after the other
  StepNorm own_norm, own_extra, cross_norm, cross_extra, final_norm, ffn_norm;
  TensorView own_heads, cross_heads;  // f32 [H], weights of the heads, or undefined
  TensorView residual;                // f32 [D] or undefined
  double own_scale, cross_scale;      // of scores
};

struct StepModel {
  const StepLayer* layers;
  std::int64_t count, width, hidden, heads;  // layers, D, F, H
  DType dtype;
  bool norm_first, gelu;  // gelu: the exact one; else relu
  StepNorm finish;
};

// A layer's caches, as decode_attention has them; own keys and values [S, H, K] are of x's dtype.
struct StepCaches {
  TensorView own_keys, own_values, source_keys, source_values, runs;
};

struct StepInputs {
  TensorView x;              // [R, D] f32, bf16 or f16
  TensorView row_offsets;    // i32 [B + 1]
  TensorView slots;          // i32 [R], each in [0, S), no two the same
  TensorView table;          // i32 [R, T], last dimension contiguous: decode_attention's slots, this step's included
  TensorView counts;         // i32 [B]
  TensorView own_bias;       // f32 [L or 1, H, sum of counts] or undefined
  TensorView cross_bias;     // f32 [H, sum of keys] or undefined
  const StepCaches* caches;  // of each layer
};

// Once per model: weights fit together and are packed for the active instruction set. Throws.
void check_step_model(const StepModel& model);

// Checks the inputs too.
std::int64_t decode_layers_workspace(const StepModel& model, const StepInputs& inputs, int threads);

// out [R, D] of x's dtype, contiguous, fully written; the caches' slots are written. Nothing depends on `threads`.
void decode_layers_cpu(const StepModel& model, const StepInputs& inputs, const TensorView& out,
                       const TensorView& workspace, int threads);

}  // namespace ofakern

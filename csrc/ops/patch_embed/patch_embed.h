// Patch embedding of images and videos in one pass: the contract.
//
//   pixel'[c, ...] = scale[c] * pixel[c, ...] + shift[c]
//   y[t]   = bias + type + position[p(t)] + sum over c, kt, i, j of weight[d, c, kt, i, j] * pixel'[t's cell, c, kt, i,
//   j] out[t] = ln_weight * (y[t] - mean y[t]) / sqrt(var y[t] + eps) + ln_bias      (y[t] itself without LayerNorm)
//
// Tokens are packed: the images of images[0], then of images[1], ...; inside an image row-major over (T/kt, H/ph,
// W/pw). p(t) is position_index[t], or without one the token's number inside its image.
//
// Sums are f32. Derivation of the folding, layout, flops and floors: README.md beside this file.
#pragma once

#include <cstdint>

#include "core/stream.h"
#include "core/tensor_view.h"

namespace ofakern {

struct PatchEmbedInputs {
  const TensorView* images;  // [n, T, C, H, W] each: u8, f32, bf16 or f16, one dtype; either W or (W, C) is contiguous
  std::int64_t image_count;
  TensorView weight;          // [D, C, kt, ph, pw], f32, bf16 or f16, contiguous; out has its dtype
  TensorView normalise;       // f64 [2, C]: scale (not 0), shift
  TensorView bias;            // f32 [D] or undefined, as the next four
  TensorView type_embedding;  // f32 [D]
  TensorView position;        // [P, D], weight's dtype
  TensorView position_index;  // i32 [N], each in [0, P)
  TensorView ln_weight;       // f32 [D], with ln_bias or undefined
  TensorView ln_bias;         // f32 [D]
  double eps;
};

// Contiguous and fully written; undefined when the input is.
struct PatchEmbedGradients {
  TensorView dweight;     // like weight
  TensorView dbias;       // f32 [D]; the gradient of bias and of type_embedding
  TensorView dposition;   // like position
  TensorView dln_weight;  // f32 [D]
  TensorView dln_bias;    // f32 [D]
};

// What each backend checks of a call; the first returns the number of tokens. index_is_read: position_index is memory
// of the host, so that its entries are checked; a GPU makes NaN of the token of an entry that is none, and no gradient.
std::int64_t check_patch_embed(const PatchEmbedInputs& inputs, bool index_is_read);
void check_patch_embed_rows(const char* argument, const TensorView& x, std::int64_t tokens, const TensorView& weight);
void check_patch_embed_gradients(const PatchEmbedInputs& inputs, const PatchEmbedGradients& gradients);

// Rows of out; of checked inputs.
std::int64_t patch_embed_tokens(const PatchEmbedInputs& inputs);

// Bytes of scratch that a call needs. The result of a call does not depend on `threads`.
std::int64_t patch_embed_forward_workspace(const PatchEmbedInputs& inputs, int threads);
std::int64_t patch_embed_backward_workspace(const PatchEmbedInputs& inputs, int threads);

// out [N, D] of weight's dtype, contiguous, fully written.
void patch_embed_forward_cpu(const PatchEmbedInputs& inputs, const TensorView& out, const TensorView& workspace,
                             int threads);

// dout [N, D] of weight's dtype, contiguous. Nothing of the forward pass is kept: y is computed again.
void patch_embed_backward_cpu(const PatchEmbedInputs& inputs, const TensorView& dout,
                              const PatchEmbedGradients& gradients, const TensorView& workspace, int threads);

// On a GPU (normalise stays on the host), for D a multiple of 8 up to 2048, at most 16 channels and 8192 pixels a
// patch. Neither waits for the device.
std::int64_t patch_embed_forward_cuda_workspace(const PatchEmbedInputs& inputs);
std::int64_t patch_embed_backward_cuda_workspace(const PatchEmbedInputs& inputs);
void patch_embed_forward_cuda(const PatchEmbedInputs& inputs, const TensorView& out, const TensorView& workspace,
                              Stream stream);
// The tokens of each row of position: order i64 [N'] lists them, row after row, from offsets[row], i64 [P + 1], on.
// Both undefined: token p of every image, for one tensor of images without position_index.
struct PatchEmbedPlaces {
  TensorView order, offsets;
};
void patch_embed_backward_cuda(const PatchEmbedInputs& inputs, const TensorView& dout,
                               const PatchEmbedGradients& gradients, const PatchEmbedPlaces& places,
                               const TensorView& workspace, Stream stream);

}  // namespace ofakern

// Checks every argument against the contract in patch_embed.h, for all of its backends.
#include <string>

#include "core/check.h"
#include "ops/patch_embed/patch_embed.h"

namespace ofakern {
namespace {

// Text is made only where a rule is broken: small calls would notice.
constexpr Checker kCheck("patch_embed");
constexpr int kSides[3] = {1, 3, 4};  // T, H, W of [n, T, C, H, W]

void check_vector(const char* argument, const TensorView& x, std::int64_t width) {
  if (x.defined()) kCheck.plain(argument, x, "[D]", {width}, DType::f32);
}

void check_images(const std::string& argument, const TensorView& x, const TensorView& first, const TensorView& weight) {
  kCheck.dtype(argument.c_str(), x, {DType::u8, DType::f32, DType::bf16, DType::f16});
  kCheck.same_dtype(argument.c_str(), x, "images[0]", first);
  kCheck.device(argument.c_str(), x);
  kCheck.shape(argument.c_str(), x, "[n, T, C, H, W]", {-1, -1, weight.shape[1], -1, -1});
  const bool planar = x.stride[4] == 1, interleaved = x.stride[2] == 1 && x.stride[4] == x.shape[2];
  const bool ordered = first.stride[4] == 1 ? planar : interleaved;
  if (!ordered)
    kCheck.fail_value(argument, "have contiguous rows of W, or of (W, C), as images[0]",
                      "strides " + std::to_string(x.stride[4]) + " of W, " + std::to_string(x.stride[2]) + " of C");
  for (int s = 0; s < 3; ++s) {
    const std::int64_t side = x.shape[kSides[s]], patch = weight.shape[2 + s];
    if (side % patch != 0)
      kCheck.fail_value(argument, "have sides that are multiples of the patch's (" + std::to_string(patch) + ")",
                        std::to_string(side));
  }
}

void check_index(const PatchEmbedInputs& in, std::int64_t tokens) {
  const std::int64_t rows = in.position.shape[0];
  const std::int32_t* index = in.position_index.as<const std::int32_t>();
  std::int64_t t = 0;
  while (t < tokens && 0 <= index[t] && index[t] < rows) ++t;
  if (t < tokens)
    kCheck.fail_value("position_index", "be in [0, " + std::to_string(rows) + ")",
                      std::to_string(index[t]) + " for token " + std::to_string(t));
}

void check_positions(const PatchEmbedInputs& in, std::int64_t tokens, bool index_is_read) {
  if (!in.position.defined()) {
    kCheck.absent("position_index", in.position_index, "position was not given");
    return;
  }
  kCheck.plain("position", in.position, "[P, D]", {-1, in.weight.shape[0]}, in.weight.dtype);
  const std::int64_t rows = in.position.shape[0];
  if (in.position_index.defined()) {
    kCheck.plain("position_index", in.position_index, "[N]", {tokens}, DType::i32);
    if (index_is_read) check_index(in, tokens);
    return;
  }
  for (std::int64_t i = 0; i < in.image_count; ++i) {
    const TensorView& x = in.images[i];
    const std::int64_t patches = x.shape[0] == 0 ? 0
                                                 : x.shape[1] / in.weight.shape[2] * (x.shape[3] / in.weight.shape[3]) *
                                                       (x.shape[4] / in.weight.shape[4]);
    kCheck.that(patches <= rows, "position", "have a row for every patch of an image (" + std::to_string(patches) + ")",
                std::to_string(rows));
  }
}

}  // namespace

std::int64_t patch_embed_tokens(const PatchEmbedInputs& inputs) {
  std::int64_t tokens = 0;
  for (std::int64_t i = 0; i < inputs.image_count; ++i) {
    std::int64_t count = inputs.images[i].shape[0];
    for (int s = 0; s < 3; ++s) count *= inputs.images[i].shape[kSides[s]] / inputs.weight.shape[2 + s];
    tokens += count;
  }
  return tokens;
}

std::int64_t check_patch_embed(const PatchEmbedInputs& in, bool index_is_read) {
  kCheck.given("weight", in.weight);
  kCheck.dtype("weight", in.weight, {DType::f32, DType::bf16, DType::f16});
  kCheck.shape("weight", in.weight, "[D, C, kt, ph, pw]", {-1, -1, -1, -1, -1});
  kCheck.device("weight", in.weight);
  kCheck.contiguous("weight", in.weight);
  if (in.weight.numel() <= 0) kCheck.fail_value("weight", "not be empty", describe(in.weight));
  kCheck.dtype("normalise", in.normalise, {DType::f64});
  kCheck.shape("normalise", in.normalise, "[2, C]", {2, in.weight.shape[1]});
  kCheck.device("normalise", in.normalise, Device::cpu);
  kCheck.contiguous("normalise", in.normalise);
  const double* scale = in.normalise.as<const double>();
  for (std::int64_t c = 0; c < in.weight.shape[1]; ++c)
    if (scale[c] == 0) kCheck.fail_value("normalise", "have no scale of 0", "channel " + std::to_string(c));
  for (std::int64_t i = 0; i < in.image_count; ++i)
    check_images("images[" + std::to_string(i) + "]", in.images[i], in.images[0], in.weight);
  const std::int64_t tokens = patch_embed_tokens(in);
  const std::int64_t width = in.weight.shape[0];
  check_vector("bias", in.bias, width);
  check_vector("type_embedding", in.type_embedding, width);
  check_vector("ln_weight", in.ln_weight, width);
  check_vector("ln_bias", in.ln_bias, width);
  if (in.ln_weight.defined() != in.ln_bias.defined())
    kCheck.fail_value("ln_bias", "be given exactly when ln_weight is",
                      in.ln_bias.defined() ? "only ln_bias" : "only ln_weight");
  if (!(in.eps >= 0)) kCheck.fail_value("eps", "be at least 0", std::to_string(in.eps));
  check_positions(in, tokens, index_is_read);
  return tokens;
}

void check_patch_embed_rows(const char* argument, const TensorView& x, std::int64_t tokens, const TensorView& weight) {
  kCheck.plain(argument, x, "[N, D]", {tokens, weight.shape[0]}, weight.dtype);
}

void check_patch_embed_gradients(const PatchEmbedInputs& in, const PatchEmbedGradients& out) {
  const TensorView& w = in.weight;
  kCheck.plain("dweight", out.dweight, "[D, C, kt, ph, pw]",
               {w.shape[0], w.shape[1], w.shape[2], w.shape[3], w.shape[4]}, w.dtype);
  kCheck.given("dbias", out.dbias);
  check_vector("dbias", out.dbias, w.shape[0]);
  if (in.position.defined())
    kCheck.plain("dposition", out.dposition, "[P, D]", {in.position.shape[0], w.shape[0]}, w.dtype);
  else
    kCheck.absent("dposition", out.dposition, "position was not given");
  if (in.ln_weight.defined()) {
    kCheck.given("dln_weight", out.dln_weight);
    kCheck.given("dln_bias", out.dln_bias);
    check_vector("dln_weight", out.dln_weight, w.shape[0]);
    check_vector("dln_bias", out.dln_bias, w.shape[0]);
  } else {
    kCheck.absent("dln_weight", out.dln_weight, "ln_weight was not given");
    kCheck.absent("dln_bias", out.dln_bias, "ln_bias was not given");
  }
}

}  // namespace ofakern

// Checks the arguments, then calls the active instruction set's kernel.
#include "ops/patch_embed/patch_embed.h"

#include "core/check.h"
#include "core/isa.h"

namespace ofakern {

OFAKERN_DECLARE_FOR_EACH_ISA(std::int64_t patch_embed_forward_workspace(const PatchEmbedInputs& in, int threads);
                             std::int64_t patch_embed_backward_workspace(const PatchEmbedInputs& in, int threads);
                             void patch_embed_forward(const PatchEmbedInputs& in, const TensorView& out,
                                                      const TensorView& workspace, int threads);
                             void patch_embed_backward(const PatchEmbedInputs& in, const TensorView& dout,
                                                       const PatchEmbedGradients& gradients,
                                                       const TensorView& workspace, int threads);)

std::int64_t patch_embed_forward_workspace(const PatchEmbedInputs& inputs, int threads) {
  check_patch_embed(inputs, true);
  return OFAKERN_DISPATCH(patch_embed_forward_workspace, inputs, threads);
}

std::int64_t patch_embed_backward_workspace(const PatchEmbedInputs& inputs, int threads) {
  check_patch_embed(inputs, true);
  return OFAKERN_DISPATCH(patch_embed_backward_workspace, inputs, threads);
}

void patch_embed_forward_cpu(const PatchEmbedInputs& inputs, const TensorView& out, const TensorView& workspace,
                             int threads) {
  check_patch_embed_rows("out", out, check_patch_embed(inputs, true), inputs.weight);
  Checker("patch_embed")
      .workspace("workspace", workspace, OFAKERN_DISPATCH(patch_embed_forward_workspace, inputs, threads));
  OFAKERN_DISPATCH(patch_embed_forward, inputs, out, workspace, threads);
}

void patch_embed_backward_cpu(const PatchEmbedInputs& inputs, const TensorView& dout,
                              const PatchEmbedGradients& gradients, const TensorView& workspace, int threads) {
  check_patch_embed_rows("dout", dout, check_patch_embed(inputs, true), inputs.weight);
  check_patch_embed_gradients(inputs, gradients);
  Checker("patch_embed")
      .workspace("workspace", workspace, OFAKERN_DISPATCH(patch_embed_backward_workspace, inputs, threads));
  OFAKERN_DISPATCH(patch_embed_backward, inputs, dout, gradients, workspace, threads);
}

}  // namespace ofakern

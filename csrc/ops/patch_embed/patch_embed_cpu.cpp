// Compiled once per instruction set; see core/isa.h.
#include "core/with_type.h"
#include "ops/patch_embed/patch_embed_backward.h"
#include "ops/patch_embed/patch_embed_forward.h"

namespace ofakern::OFAKERN_ISA {

i64 patch_embed_forward_workspace(const PatchEmbedInputs& in, int threads) {
  return with_type(in.weight.dtype, [&](auto type) {
    using T = decltype(type);
    Arena arena(nullptr);
    PatchForwardMemory<T>::take(make_patch_problem<T>(in), threads, arena);
    return arena.used();
  });
}

i64 patch_embed_backward_workspace(const PatchEmbedInputs& in, int threads) {
  return with_type(in.weight.dtype, [&](auto type) {
    using T = decltype(type);
    Arena arena(nullptr);
    PatchBackwardMemory<T>::take(make_patch_problem<T>(in), threads, arena);
    return arena.used();
  });
}

void patch_embed_forward(const PatchEmbedInputs& in, const TensorView& out, const TensorView& workspace, int threads) {
  with_type(in.weight.dtype, [&](auto type) { patch_forward<decltype(type)>(in, out, workspace.data, threads); });
}

void patch_embed_backward(const PatchEmbedInputs& in, const TensorView& dout, const PatchEmbedGradients& gradients,
                          const TensorView& workspace, int threads) {
  with_type(in.weight.dtype,
            [&](auto type) { patch_backward<decltype(type)>(in, dout, gradients, workspace.data, threads); });
}

}  // namespace ofakern::OFAKERN_ISA

// ops.patch_embed: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "ops/patch_embed/patch_embed.h"
#include "tensor_caster.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr std::size_t kInputs = 11;  // what read_inputs takes, threads included

struct Call {
  std::vector<TensorView> images;
  PatchEmbedInputs inputs;
  int threads;
};

Call read_inputs(Arguments& args) {
  Call call;
  PatchEmbedInputs& in = call.inputs;
  call.images = args.tensors("images");
  in.weight = args.tensor("weight");
  in.normalise = args.tensor("normalise");
  in.bias = args.tensor("bias");
  in.type_embedding = args.tensor("type_embedding");
  in.position = args.tensor("position");
  in.position_index = args.tensor("position_index");
  in.ln_weight = args.tensor("ln_weight");
  in.ln_bias = args.tensor("ln_bias");
  in.eps = args.real("eps");
  call.threads = args.threads();
  in.images = call.images.data();
  in.image_count = static_cast<std::int64_t>(call.images.size());
  return call;
}

void forward(const py::args& values) {
  Arguments args("patch_embed", values, 2 + kInputs);
  const TensorView out = args.tensor("out");
  const TensorView workspace = args.tensor("workspace");
  const Call call = read_inputs(args);
  const py::gil_scoped_release release;
  patch_embed_forward_cpu(call.inputs, out, workspace, call.threads);
}

void backward(const py::args& values) {
  Arguments args("patch_embed", values, 7 + kInputs);
  PatchEmbedGradients gradients;
  gradients.dweight = args.tensor("dweight");
  gradients.dbias = args.tensor("dbias");
  gradients.dposition = args.tensor("dposition");
  gradients.dln_weight = args.tensor("dln_weight");
  gradients.dln_bias = args.tensor("dln_bias");
  const TensorView workspace = args.tensor("workspace");
  const TensorView dout = args.tensor("dout");
  const Call call = read_inputs(args);
  const py::gil_scoped_release release;
  patch_embed_backward_cpu(call.inputs, dout, gradients, workspace, call.threads);
}

std::int64_t forward_workspace(const py::args& values) {
  Arguments args("patch_embed", values, kInputs);
  const Call call = read_inputs(args);
  return patch_embed_forward_workspace(call.inputs, call.threads);
}

std::int64_t backward_workspace(const py::args& values) {
  Arguments args("patch_embed", values, kInputs);
  const Call call = read_inputs(args);
  return patch_embed_backward_workspace(call.inputs, call.threads);
}

}  // namespace

void bind_patch_embed(py::module_& m) {
  m.def("patch_embed_forward", &forward);
  m.def("patch_embed_backward", &backward);
  m.def("patch_embed_forward_workspace", &forward_workspace);
  m.def("patch_embed_backward_workspace", &backward_workspace);
}

}  // namespace ofakern

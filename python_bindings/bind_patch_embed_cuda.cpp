// ops.patch_embed on a GPU: inputs as in bind_patch_embed.cpp, without the number of threads; results are made here.
// normalise stays on the host.
#include <pybind11/pybind11.h>

#include "cuda_call.h"
#include "cuda_ops.h"
#include "ops/patch_embed/patch_embed.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr std::size_t kInputs = 10;  // what read_inputs takes

struct Given {
  std::vector<TensorView> images;
  PatchEmbedInputs inputs;
};

void read_inputs(Arguments& args, Given& given) {
  PatchEmbedInputs& in = given.inputs;
  given.images = args.tensors("images");
  in.weight = args.tensor("weight");
  in.normalise = args.tensor("normalise");
  in.bias = args.tensor("bias");
  in.type_embedding = args.tensor("type_embedding");
  in.position = args.tensor("position");
  in.position_index = args.tensor("position_index");
  in.ln_weight = args.tensor("ln_weight");
  in.ln_bias = args.tensor("ln_bias");
  in.eps = args.real("eps");
  in.images = given.images.data();
  in.image_count = static_cast<std::int64_t>(given.images.size());
}

py::object forward(const py::args& values) {
  Arguments args("patch_embed", values, kInputs);
  Given given;
  read_inputs(args, given);
  const PatchEmbedInputs& in = given.inputs;
  const CudaCall call("patch_embed", "weight", in.weight);
  Made made(in.weight);
  const TensorView out = made.empty(in.weight.dtype, {check_patch_embed(in, false), in.weight.shape[0]});
  const TensorView workspace = made.workspace(patch_embed_forward_cuda_workspace(in));
  {
    const py::gil_scoped_release release;
    patch_embed_forward_cuda(in, out, workspace, call.stream());
  }
  return made.results();
}

// dweight, dbias, dposition, dln_weight, dln_bias; None for what was not given.
py::object backward(const py::args& values) {
  Arguments args("patch_embed", values, 3 + kInputs);
  const TensorView dout = args.tensor("dout");
  const PatchEmbedPlaces places = {args.tensor("order"), args.tensor("offsets")};
  Given given;
  read_inputs(args, given);
  const PatchEmbedInputs& in = given.inputs;
  const CudaCall call("patch_embed", "weight", in.weight);
  check_patch_embed(in, false);
  Made made(in.weight);
  const auto optional = [&](const TensorView& x) { return x.defined() ? made.like(x) : made.none(); };
  const TensorView dweight = made.like(in.weight), dbias = made.empty(DType::f32, {in.weight.shape[0]});
  const TensorView dposition = optional(in.position), dln_weight = optional(in.ln_weight);
  const PatchEmbedGradients gradients = {dweight, dbias, dposition, dln_weight, optional(in.ln_bias)};
  const TensorView workspace = made.workspace(patch_embed_backward_cuda_workspace(in));
  {
    const py::gil_scoped_release release;
    patch_embed_backward_cuda(in, dout, gradients, places, workspace, call.stream());
  }
  return made.results();
}

}  // namespace

void bind_patch_embed_cuda(py::module_& m) {
  m.def("patch_embed", &forward);
  m.def("patch_embed_gradients", &backward);
}

}  // namespace ofakern

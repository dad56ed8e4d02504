// ops.patch_embed: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include <algorithm>

#include "ops/patch_embed/patch_embed.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr std::size_t kInputs = 11;  // what read_inputs takes, threads included

struct Call {
  std::vector<TensorView> images;
  PatchEmbedInputs inputs;
  int threads;
};

void read_vectors(Arguments& args, PatchEmbedInputs* in) {
  in->bias = args.tensor("bias");
  in->type_embedding = args.tensor("type_embedding");
  in->position = args.tensor("position");
  in->position_index = args.tensor("position_index");
  in->ln_weight = args.tensor("ln_weight");
  in->ln_bias = args.tensor("ln_bias");
  in->eps = args.real("eps");
}

Call read_inputs(Arguments& args) {
  Call call;
  PatchEmbedInputs& in = call.inputs;
  call.images = args.tensors("images");
  in.weight = args.tensor("weight");
  in.normalise = args.tensor("normalise");
  read_vectors(args, &in);
  call.threads = args.threads();
  in.images = call.images.data();
  in.image_count = static_cast<std::int64_t>(call.images.size());
  return call;
}

// ---- images and weights as users have them --------------------------------------------------------------------------

// [n, T, C, H, W] of an image `layout` ("chw", "thwc", ...), with n in front of it or without.
TensorView as_frames(const TensorView& x, const std::string& layout) {
  const int letters = static_cast<int>(layout.size()), batched = x.ndim - letters;
  if (batched != 0 && batched != 1)
    Checker("patch_embed")
        .fail_value("images", "have the dimensions of layout '" + layout + "', with n or without", describe(x));
  TensorView frames = x;
  frames.ndim = 5;
  static constexpr char kOrder[] = "ntchw";
  for (int d = 0; d < 5; ++d) {
    const std::size_t at = layout.find(kOrder[d]);
    const int from = d == 0 ? batched - 1 : at == std::string::npos ? -1 : static_cast<int>(at) + batched;
    frames.shape[d] = from < 0 ? 1 : x.shape[from];
    frames.stride[d] = from < 0 ? 0 : x.stride[from];
  }
  return frames;
}

// The weight of a Conv2d is that of a Conv3d with tubelets of one frame.
TensorView as_tubelets(const TensorView& weight) {
  TensorView view = weight;
  if (weight.ndim != 4) return view;
  view.ndim = 5;
  view.shape[2] = 1;
  view.stride[2] = weight.shape[2] * weight.stride[2];
  std::copy(weight.shape + 2, weight.shape + 4, view.shape + 3);
  std::copy(weight.stride + 2, weight.stride + 4, view.stride + 3);
  return view;
}

// Planar or interleaved, all alike: what the kernel reads in place.
bool readable(const std::vector<TensorView>& images, const std::string& layout) {
  bool planar = true, interleaved = true;
  for (const TensorView& image : images) {
    const TensorView x = as_frames(image, layout);
    planar = planar && x.stride[4] == 1;
    interleaved = interleaved && x.stride[2] == 1 && x.stride[4] == x.shape[2];
  }
  return planar || interleaved;
}

// A call whose results torch makes. It is not moved once it is read: its views point into it.
struct UserCall {
  std::vector<TensorView> images;
  std::vector<double> normalise;
  TensorView weight;  // as given
  PatchEmbedInputs inputs;
  int threads;

  void read(Arguments& args) {
    const std::string layout = args.text("layout");
    for (const TensorView& image : args.tensors("images", [&](const auto& all) { return readable(all, layout); }))
      images.push_back(as_frames(image, layout));
    weight = args.tensor("weight");
    normalise = args.reals("scale");
    const std::vector<double> shift = args.reals("shift");
    Checker("patch_embed")
        .that(shift.size() == normalise.size(), "shift", "be as many numbers as scale", std::to_string(shift.size()));
    normalise.insert(normalise.end(), shift.begin(), shift.end());
    read_vectors(args, &inputs);
    threads = args.threads();
    inputs.images = images.data();
    inputs.image_count = static_cast<std::int64_t>(images.size());
    inputs.weight = as_tubelets(weight);
    inputs.normalise = row_major_view(normalise.data(), DType::f64, {2, static_cast<std::int64_t>(shift.size())});
  }
};

constexpr std::size_t kUserInputs = kInputs + 2;

py::object make_forward(const py::args& values) {
  Arguments args("patch_embed", values, kUserInputs, Unready::copied);
  UserCall call;
  call.read(args);
  const PatchEmbedInputs& in = call.inputs;
  const std::int64_t bytes = patch_embed_forward_workspace(in, call.threads);  // after its checks shapes are known
  Made made;
  const TensorView out = made.empty(in.weight.dtype, {patch_embed_tokens(in), in.weight.shape[0]}),
                   workspace = made.workspace(bytes);
  {
    const py::gil_scoped_release release;
    patch_embed_forward_cpu(in, out, workspace, call.threads);
  }
  return made.results();
}

// A schema cannot return None: the gradient of what is not given is a tensor without elements.
TensorView make_gradient(Made& made, const TensorView& x) {
  if (x.defined()) return made.like(x);
  made.empty(DType::f32, {0});
  return {};
}

py::object make_backward(const py::args& values) {
  Arguments args("patch_embed", values, 1 + kUserInputs, Unready::copied);
  const TensorView dout = args.tensor("dout");
  UserCall call;
  call.read(args);
  const PatchEmbedInputs& in = call.inputs;
  const std::int64_t bytes = patch_embed_backward_workspace(in, call.threads);
  Made made;
  PatchEmbedGradients gradients;
  gradients.dweight = as_tubelets(made.like(call.weight));
  gradients.dbias = made.empty(DType::f32, {in.weight.shape[0]});
  gradients.dposition = make_gradient(made, in.position);
  gradients.dln_weight = make_gradient(made, in.ln_weight);
  gradients.dln_bias = make_gradient(made, in.ln_bias);
  const TensorView workspace = made.workspace(bytes);
  {
    const py::gil_scoped_release release;
    patch_embed_backward_cpu(in, dout, gradients, workspace, call.threads);
  }
  return made.results();
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
  m.def("patch_embed", &make_forward);
  m.def("patch_embed_gradients", &make_backward);
  m.def("patch_embed_forward", &forward);
  m.def("patch_embed_backward", &backward);
  m.def("patch_embed_forward_workspace", &forward_workspace);
  m.def("patch_embed_backward_workspace", &backward_workspace);
}

}  // namespace ofakern

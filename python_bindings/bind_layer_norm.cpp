// ops.layer_norm: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include <algorithm>

#include "ops/layer_norm/layer_norm.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

LayerNormAffine read_affine(Arguments& args) {
  LayerNormAffine affine;
  affine.weight = args.tensor("weight");
  affine.bias = args.tensor("bias");
  affine.eps = args.real("eps");
  return affine;
}

// A backward pass reads neither bias nor eps.
LayerNormAffine read_weight(Arguments& args) {
  LayerNormAffine affine;
  affine.weight = args.tensor("weight");
  affine.eps = 0;
  return affine;
}

Dropout read_dropout(Arguments& args) {
  Dropout dropout;
  dropout.seed = args.tensor("dropout_seed");
  dropout.p = args.real("dropout_p");
  return dropout;
}

AffineGradients read_gradients(Arguments& args) {
  AffineGradients gradients;
  gradients.dweight = args.tensor("dweight");
  gradients.dbias = args.tensor("dbias");
  return gradients;
}

EmbedInputs read_embed(Arguments& args) {
  EmbedInputs in;
  in.tokens = args.tensor("tokens");
  in.table = args.tensor("table");
  in.types = args.tensor("types");
  in.type_table = args.tensor("type_table");
  in.scale = args.real("scale");
  return in;
}

void add_forward(const py::args& values) {
  Arguments args("add_layer_norm", values, 12);
  const TensorView out = args.tensor("out"), total = args.tensor("total"), stats = args.tensor("stats");
  const TensorView workspace = args.tensor("workspace");
  const TensorView x = args.tensor("x"), residual = args.tensor("residual");
  const LayerNormAffine affine = read_affine(args);
  const Dropout dropout = read_dropout(args);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  add_layer_norm_forward_cpu(x, residual, affine, dropout, out, total, stats, workspace, threads);
}

void add_backward(const py::args& values) {
  Arguments args("add_layer_norm", values, 13);
  const TensorView dx = args.tensor("dx"), dresidual = args.tensor("dresidual");
  const AffineGradients gradients = read_gradients(args);
  const TensorView workspace = args.tensor("workspace");
  const TensorView dout = args.tensor("dout"), dtotal = args.tensor("dtotal");
  const TensorView total = args.tensor("total"), stats = args.tensor("stats");
  const LayerNormAffine affine = read_weight(args);
  const Dropout dropout = read_dropout(args);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  add_layer_norm_backward_cpu(dout, dtotal, total, stats, affine, dropout, dx, dresidual, gradients, workspace,
                              threads);
}

void gelu_forward(const py::args& values) {
  Arguments args("gelu_layer_norm", values, 8);
  const TensorView out = args.tensor("out"), stats = args.tensor("stats"), workspace = args.tensor("workspace");
  const TensorView x = args.tensor("x");
  const LayerNormAffine affine = read_affine(args);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  gelu_layer_norm_forward_cpu(x, affine, out, stats, workspace, threads);
}

void gelu_backward(const py::args& values) {
  Arguments args("gelu_layer_norm", values, 9);
  const TensorView dx = args.tensor("dx");
  const AffineGradients gradients = read_gradients(args);
  const TensorView workspace = args.tensor("workspace");
  const TensorView dout = args.tensor("dout"), x = args.tensor("x"), stats = args.tensor("stats");
  const LayerNormAffine affine = read_weight(args);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  gelu_layer_norm_backward_cpu(dout, x, stats, affine, dx, gradients, workspace, threads);
}

void head_forward(const py::args& values) {
  Arguments args("head_scale_layer_norm", values, 9);
  const TensorView out = args.tensor("out"), stats = args.tensor("stats"), workspace = args.tensor("workspace");
  const TensorView x = args.tensor("x"), head_scale = args.tensor("head_scale");
  const LayerNormAffine affine = read_affine(args);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  head_scale_layer_norm_forward_cpu(x, head_scale, affine, out, stats, workspace, threads);
}

void head_backward(const py::args& values) {
  Arguments args("head_scale_layer_norm", values, 11);
  const TensorView dx = args.tensor("dx"), dhead_scale = args.tensor("dhead_scale");
  const AffineGradients gradients = read_gradients(args);
  const TensorView workspace = args.tensor("workspace");
  const TensorView dout = args.tensor("dout"), x = args.tensor("x"), head_scale = args.tensor("head_scale");
  const TensorView stats = args.tensor("stats");
  const LayerNormAffine affine = read_weight(args);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  head_scale_layer_norm_backward_cpu(dout, x, head_scale, stats, affine, dx, dhead_scale, gradients, workspace,
                                     threads);
}

void embed_forward(const py::args& values) {
  Arguments args("embed_layer_norm", values, 12);
  const TensorView out = args.tensor("out"), stats = args.tensor("stats"), workspace = args.tensor("workspace");
  const EmbedInputs in = read_embed(args);
  const LayerNormAffine affine = read_affine(args);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  embed_layer_norm_forward_cpu(in, affine, out, stats, workspace, threads);
}

void embed_backward(const py::args& values) {
  Arguments args("embed_layer_norm", values, 14);
  const TensorView dtable = args.tensor("dtable"), dtype_table = args.tensor("dtype_table");
  const AffineGradients gradients = read_gradients(args);
  const TensorView workspace = args.tensor("workspace");
  const TensorView dout = args.tensor("dout");
  const EmbedInputs in = read_embed(args);
  const TensorView stats = args.tensor("stats");
  const LayerNormAffine affine = read_weight(args);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  embed_layer_norm_backward_cpu(dout, in, stats, affine, dtable, dtype_table, false, gradients, workspace, threads);
}

// ---- with results that torch makes ----------------------------------------------------------------------------------
// Their sizes are taken from arguments that the op has not checked yet: whatever they are, the checks come first thing.

// Rows of the last `row_dims` dimensions.
std::int64_t width_of(const TensorView& x, int row_dims = 1) {
  std::int64_t width = 1;
  for (int d = std::max(x.ndim - row_dims, 0); d < x.ndim; ++d) width *= x.shape[d];
  return std::max<std::int64_t>(width, 1);
}

struct ForwardMemory {
  TensorView stats, workspace;
};

// Statistics that no gradient will read are scratch, behind the kernel's own, and None among the results.
ForwardMemory make_memory(Made& made, std::int64_t rows, std::int64_t width, int threads, bool keeps_stats) {
  const std::int64_t bytes = layer_norm_forward_workspace(width, threads);
  if (keeps_stats) {
    const TensorView stats = made.empty(DType::f32, {rows, 2});
    return {stats, made.workspace(bytes)};
  }
  made.none();
  const TensorView workspace = made.workspace(bytes + rows * 2 * size_of(DType::f32));
  return {row_major_view(workspace.as<char>() + bytes, DType::f32, {rows, 2}), workspace};
}

AffineGradients make_gradients(Made& made, const LayerNormAffine& affine) {
  AffineGradients gradients;
  gradients.dweight = made.like(affine.weight);
  gradients.dbias = made.like(affine.weight);
  return gradients;
}

py::object make_add(const py::args& values) {
  Arguments args("add_layer_norm", values, 9, Unready::copied);
  const TensorView x = args.tensor("x"), residual = args.tensor("residual");
  const LayerNormAffine affine = read_affine(args);
  const Dropout dropout = read_dropout(args);
  const int threads = args.threads();
  const bool keeps_stats = args.flag("keeps_stats");
  const std::int64_t width = width_of(x);
  Made made;
  const TensorView out = made.like(x), total = made.like(x);
  const ForwardMemory memory = make_memory(made, x.numel() / width, width, threads, keeps_stats);
  {
    const py::gil_scoped_release release;
    add_layer_norm_forward_cpu(x, residual, affine, dropout, out, total, memory.stats, memory.workspace, threads);
  }
  return made.results();
}

// Without dropout dx is None: dresidual is it.
py::object make_add_gradients(const py::args& values) {
  Arguments args("add_layer_norm", values, 8, Unready::copied);
  const TensorView dout = args.tensor("dout"), dtotal = args.tensor("dtotal");
  const TensorView total = args.tensor("total"), stats = args.tensor("stats");
  const LayerNormAffine affine = read_weight(args);
  const Dropout dropout = read_dropout(args);
  const int threads = args.threads();
  Made made;
  const TensorView dx = dropout.p > 0 ? made.like(total) : made.none(), dresidual = made.like(total);
  const AffineGradients gradients = make_gradients(made, affine);
  const std::int64_t rows = total.numel() / width_of(total);
  const TensorView workspace = made.workspace(layer_norm_backward_workspace(rows, width_of(total), 0, threads));
  {
    const py::gil_scoped_release release;
    add_layer_norm_backward_cpu(dout, dtotal, total, stats, affine, dropout, dx, dresidual, gradients, workspace,
                                threads);
  }
  return made.results();
}

py::object make_gelu(const py::args& values) {
  Arguments args("gelu_layer_norm", values, 6, Unready::copied);
  const TensorView x = args.tensor("x");
  const LayerNormAffine affine = read_affine(args);
  const int threads = args.threads();
  const bool keeps_stats = args.flag("keeps_stats");
  const std::int64_t width = width_of(x);
  Made made;
  const TensorView out = made.like(x);
  const ForwardMemory memory = make_memory(made, x.numel() / width, width, threads, keeps_stats);
  {
    const py::gil_scoped_release release;
    gelu_layer_norm_forward_cpu(x, affine, out, memory.stats, memory.workspace, threads);
  }
  return made.results();
}

py::object make_gelu_gradients(const py::args& values) {
  Arguments args("gelu_layer_norm", values, 5, Unready::copied);
  const TensorView dout = args.tensor("dout"), x = args.tensor("x"), stats = args.tensor("stats");
  const LayerNormAffine affine = read_weight(args);
  const int threads = args.threads();
  Made made;
  const TensorView dx = made.like(x);
  const AffineGradients gradients = make_gradients(made, affine);
  const std::int64_t rows = x.numel() / width_of(x);
  const TensorView workspace = made.workspace(layer_norm_backward_workspace(rows, width_of(x), 0, threads));
  {
    const py::gil_scoped_release release;
    gelu_layer_norm_backward_cpu(dout, x, stats, affine, dx, gradients, workspace, threads);
  }
  return made.results();
}

py::object make_head(const py::args& values) {
  Arguments args("head_scale_layer_norm", values, 7, Unready::copied);
  const TensorView x = args.tensor("x"), head_scale = args.tensor("head_scale");
  const LayerNormAffine affine = read_affine(args);
  const int threads = args.threads();
  const bool keeps_stats = args.flag("keeps_stats");
  const std::int64_t width = width_of(x, 2), rows = x.numel() / width;
  Made made;
  const TensorView out = made.empty(x.dtype, {rows, width});
  const ForwardMemory memory = make_memory(made, rows, width, threads, keeps_stats);
  {
    const py::gil_scoped_release release;
    head_scale_layer_norm_forward_cpu(x, head_scale, affine, out, memory.stats, memory.workspace, threads);
  }
  return made.results();
}

py::object make_head_gradients(const py::args& values) {
  Arguments args("head_scale_layer_norm", values, 6, Unready::copied);
  const TensorView dout = args.tensor("dout"), x = args.tensor("x"), head_scale = args.tensor("head_scale");
  const TensorView stats = args.tensor("stats");
  const LayerNormAffine affine = read_weight(args);
  const int threads = args.threads();
  const std::int64_t width = width_of(x, 2), heads = x.ndim == 3 ? x.shape[1] : 0;
  Made made;
  const TensorView dx = made.like(x), dhead_scale = made.like(head_scale);
  const AffineGradients gradients = make_gradients(made, affine);
  const TensorView workspace = made.workspace(layer_norm_backward_workspace(x.numel() / width, width, heads, threads));
  {
    const py::gil_scoped_release release;
    head_scale_layer_norm_backward_cpu(dout, x, head_scale, stats, affine, dx, dhead_scale, gradients, workspace,
                                       threads);
  }
  return made.results();
}

py::object make_embed(const py::args& values) {
  Arguments args("embed_layer_norm", values, 10, Unready::copied);
  const EmbedInputs in = read_embed(args);
  const LayerNormAffine affine = read_affine(args);
  const int threads = args.threads();
  const bool keeps_stats = args.flag("keeps_stats");
  const std::int64_t width = width_of(in.table);
  TensorView shape = in.tokens;  // [..., D]
  if (shape.ndim < 0 || shape.ndim >= kMaxDims)
    Checker("embed_layer_norm").fail_value("tokens", "be a tensor of at most 7 dimensions", describe(in.tokens));
  shape.shape[shape.ndim++] = width;
  shape.dtype = in.table.dtype;
  Made made;
  const TensorView out = made.like(shape);
  const ForwardMemory memory = make_memory(made, in.tokens.numel(), width, threads, keeps_stats);
  {
    const py::gil_scoped_release release;
    embed_layer_norm_forward_cpu(in, affine, out, memory.stats, memory.workspace, threads);
  }
  return made.results();
}

// A row that is written takes pages of 4 KiB, which cost about four times as much as an eighth of a large page does.
constexpr std::int64_t kRowsPerToken = 8;

py::object make_embed_gradients(const py::args& values) {
  Arguments args("embed_layer_norm", values, 9, Unready::copied);
  const TensorView dout = args.tensor("dout");
  const EmbedInputs in = read_embed(args);
  const TensorView stats = args.tensor("stats");
  const LayerNormAffine affine = read_weight(args);
  const int threads = args.threads();
  Made made;
  const std::int64_t width = width_of(in.table), entries = (in.table.numel() + in.type_table.numel()) / width;
  // A few tokens read little of a vocabulary: the rest of its gradient is neither written nor held.
  const bool few = in.tokens.numel() * kRowsPerToken <= in.table.numel() / width;
  TensorView dtable = few ? made.unwritten_zeros(in.table) : TensorView{};
  const bool zeros = dtable.defined();
  if (!zeros) dtable = made.like(in.table);
  const TensorView dtype_table = in.type_table.defined() ? made.like(in.type_table) : made.none();
  const AffineGradients gradients = make_gradients(made, affine);
  const TensorView workspace =
      made.workspace(embed_layer_norm_backward_workspace(in.tokens.numel(), width, entries, threads));
  {
    const py::gil_scoped_release release;
    embed_layer_norm_backward_cpu(dout, in, stats, affine, dtable, dtype_table, zeros, gradients, workspace, threads);
  }
  return made.results();
}

}  // namespace

void bind_layer_norm(py::module_& m) {
  m.def("add_layer_norm", &make_add);
  m.def("add_layer_norm_gradients", &make_add_gradients);
  m.def("gelu_layer_norm", &make_gelu);
  m.def("gelu_layer_norm_gradients", &make_gelu_gradients);
  m.def("head_scale_layer_norm", &make_head);
  m.def("head_scale_layer_norm_gradients", &make_head_gradients);
  m.def("embed_layer_norm", &make_embed);
  m.def("embed_layer_norm_gradients", &make_embed_gradients);
  m.def("layer_norm_forward_workspace", &layer_norm_forward_workspace);
  m.def("layer_norm_backward_workspace", &layer_norm_backward_workspace);
  m.def("embed_layer_norm_backward_workspace", &embed_layer_norm_backward_workspace);
  m.def("add_layer_norm_forward", &add_forward);
  m.def("add_layer_norm_backward", &add_backward);
  m.def("gelu_layer_norm_forward", &gelu_forward);
  m.def("gelu_layer_norm_backward", &gelu_backward);
  m.def("head_scale_layer_norm_forward", &head_forward);
  m.def("head_scale_layer_norm_backward", &head_backward);
  m.def("embed_layer_norm_forward", &embed_forward);
  m.def("embed_layer_norm_backward", &embed_backward);
}

}  // namespace ofakern

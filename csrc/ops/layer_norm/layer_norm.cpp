// Checks every argument against the contract in layer_norm.h, then calls the active instruction set's kernel.
#include "ops/layer_norm/layer_norm.h"

#include <cmath>
#include <string>

#include "core/check.h"
#include "core/isa.h"

namespace ofakern {

OFAKERN_DECLARE_FOR_EACH_ISA(
    std::int64_t layer_norm_forward_workspace(std::int64_t width, int threads);
    std::int64_t layer_norm_backward_workspace(std::int64_t rows, std::int64_t width, std::int64_t heads, int threads);
    std::int64_t embed_layer_norm_backward_workspace(std::int64_t rows, std::int64_t width, std::int64_t entries,
                                                     int threads);
    void add_layer_norm_forward(const TensorView& x, const TensorView& residual, const LayerNormAffine& affine,
                                const Dropout& dropout, const TensorView& out, const TensorView& total,
                                const TensorView& stats, const TensorView& workspace, int threads);
    void add_layer_norm_backward(const TensorView& dout, const TensorView& dtotal, const TensorView& total,
                                 const TensorView& stats, const LayerNormAffine& affine, const Dropout& dropout,
                                 const TensorView& dx, const TensorView& dresidual, const AffineGradients& gradients,
                                 const TensorView& workspace, int threads);
    void gelu_layer_norm_forward(const TensorView& x, const LayerNormAffine& affine, const TensorView& out,
                                 const TensorView& stats, const TensorView& workspace, int threads);
    void gelu_layer_norm_backward(const TensorView& dout, const TensorView& x, const TensorView& stats,
                                  const LayerNormAffine& affine, const TensorView& dx, const AffineGradients& gradients,
                                  const TensorView& workspace, int threads);
    void head_scale_layer_norm_forward(const TensorView& x, const TensorView& head_scale, const LayerNormAffine& affine,
                                       const TensorView& out, const TensorView& stats, const TensorView& workspace,
                                       int threads);
    void head_scale_layer_norm_backward(const TensorView& dout, const TensorView& x, const TensorView& head_scale,
                                        const TensorView& stats, const LayerNormAffine& affine, const TensorView& dx,
                                        const TensorView& dhead_scale, const AffineGradients& gradients,
                                        const TensorView& workspace, int threads);
    void embed_layer_norm_forward(const EmbedInputs& in, const LayerNormAffine& affine, const TensorView& out,
                                  const TensorView& stats, const TensorView& workspace, int threads);
    void embed_layer_norm_backward(const TensorView& dout, const EmbedInputs& in, const TensorView& stats,
                                   const LayerNormAffine& affine, const TensorView& dtable,
                                   const TensorView& dtype_table, bool zeros, const AffineGradients& gradients,
                                   const TensorView& workspace, int threads);)

// Text is made only where a rule is broken: small calls would notice.
namespace {

// What decides a call's rows: activations [..., D] of any number of leading dimensions.
struct Rows {
  std::int64_t rows, width;
};

Rows check_activations(const Checker& check, const char* argument, const TensorView& x, int row_dims) {
  check.dtype(argument, x, {DType::f32, DType::bf16, DType::f16});
  if (x.ndim < row_dims)
    check.fail_value(argument, "have at least " + std::to_string(row_dims) + " dimensions", describe(x));
  check.device(argument, x, Device::cpu);
  check.contiguous(argument, x);
  Rows shape{1, 1};
  for (int d = 0; d < x.ndim; ++d) (d < x.ndim - row_dims ? shape.rows : shape.width) *= x.shape[d];
  if (shape.width < 1) check.fail_value(argument, "have rows of at least one element", describe(x));
  return shape;
}

void check_like(const Checker& check, const char* argument, const TensorView& x, const char* as_argument,
                const TensorView& as, const Rows& shape) {
  check.given(argument, x);
  check.same_dtype(argument, x, as_argument, as);
  check.device(argument, x, Device::cpu);
  check.contiguous(argument, x);
  if (x.ndim < 1 || x.numel() != shape.rows * shape.width)
    check.fail_value(argument,
                     "have " + std::to_string(shape.rows) + " rows of " + std::to_string(shape.width) + " elements",
                     describe(x));
}

void check_same_shape(const Checker& check, const char* argument, const TensorView& x, const char* as_argument,
                      const TensorView& as) {
  bool same = x.ndim == as.ndim;
  for (int d = 0; same && d < x.ndim; ++d) same = x.shape[d] == as.shape[d];
  if (!same) check.fail_value(argument, std::string("have ") + as_argument + "'s shape " + describe(as), describe(x));
}

void check_affine(const Checker& check, const LayerNormAffine& affine, std::int64_t width, bool forward) {
  check.plain("weight", affine.weight, "[D]", {width}, DType::f32);
  if (!forward) return;
  check.plain("bias", affine.bias, "[D]", {width}, DType::f32);
  if (!(affine.eps >= 0)) check.fail_value("eps", "be at least 0", std::to_string(affine.eps));
}

void check_stats(const Checker& check, const TensorView& stats, const Rows& shape) {
  check.plain("stats", stats, "[N, 2]", {shape.rows, 2}, DType::f32);
}

void check_dropout(const Checker& check, const Dropout& dropout) {
  if (!(dropout.p >= 0 && dropout.p < 1)) check.fail_value("dropout_p", "be in [0, 1)", std::to_string(dropout.p));
  if (dropout.p > 0) check.plain("dropout_seed", dropout.seed, "[2]", {2}, DType::i64);
}

void check_gradients(const Checker& check, const AffineGradients& gradients, std::int64_t width) {
  check.plain("dweight", gradients.dweight, "[D]", {width}, DType::f32);
  check.plain("dbias", gradients.dbias, "[D]", {width}, DType::f32);
}

void check_forward_workspace(const Checker& check, const TensorView& workspace, std::int64_t width, int threads) {
  check.workspace("workspace", workspace, layer_norm_forward_workspace(width, threads));
}

void check_index(const Checker& check, const char* argument, const TensorView& index, std::int64_t rows,
                 const char* entries_name, std::int64_t entries) {
  check.dtype(argument, index, {DType::i64});
  check.device(argument, index, Device::cpu);
  check.contiguous(argument, index);
  if (index.numel() != rows) check.fail_value(argument, "have " + std::to_string(rows) + " elements", describe(index));
  const std::int64_t* values = index.as<const std::int64_t>();
  for (std::int64_t n = 0; n < rows; ++n)
    if (values[n] < 0 || values[n] >= entries)
      check.fail_value(argument, std::string("be in [0, ") + entries_name + " = " + std::to_string(entries) + ")",
                       std::to_string(values[n]));
}

Rows check_embed(const Checker& check, const EmbedInputs& in) {
  check.dtype("table", in.table, {DType::f32, DType::bf16, DType::f16});
  check.shape("table", in.table, "[V, D]", {-1, -1});
  check.device("table", in.table, Device::cpu);
  check.contiguous("table", in.table);
  check.given("tokens", in.tokens);
  const Rows shape{in.tokens.numel(), in.table.shape[1]};
  if (shape.width < 1) check.fail_value("table", "have rows of at least one element", describe(in.table));
  check_index(check, "tokens", in.tokens, shape.rows, "V", in.table.shape[0]);
  if (in.type_table.defined()) {
    check.plain("type_table", in.type_table, "[T, D]", {-1, shape.width}, in.table.dtype);
    if (in.types.defined()) {
      check_index(check, "types", in.types, shape.rows, "T", in.type_table.shape[0]);
      check_same_shape(check, "types", in.types, "tokens", in.tokens);
    } else if (in.type_table.shape[0] != 1) {
      check.fail_value("type_table", "have one row where types is None", describe(in.type_table));
    }
  } else {
    check.absent("types", in.types, "where type_table is None");
  }
  if (!std::isfinite(in.scale)) check.fail_value("scale", "be finite", std::to_string(in.scale));
  return shape;
}

constexpr Checker kAdd("add_layer_norm");
constexpr Checker kGelu("gelu_layer_norm");
constexpr Checker kHead("head_scale_layer_norm");
constexpr Checker kEmbed("embed_layer_norm");

}  // namespace

std::int64_t layer_norm_forward_workspace(std::int64_t width, int threads) {
  return OFAKERN_DISPATCH(layer_norm_forward_workspace, width, threads);
}

std::int64_t layer_norm_backward_workspace(std::int64_t rows, std::int64_t width, std::int64_t heads, int threads) {
  return OFAKERN_DISPATCH(layer_norm_backward_workspace, rows, width, heads, threads);
}

std::int64_t embed_layer_norm_backward_workspace(std::int64_t rows, std::int64_t width, std::int64_t entries,
                                                 int threads) {
  return OFAKERN_DISPATCH(embed_layer_norm_backward_workspace, rows, width, entries, threads);
}

void add_layer_norm_forward_cpu(const TensorView& x, const TensorView& residual, const LayerNormAffine& affine,
                                const Dropout& dropout, const TensorView& out, const TensorView& total,
                                const TensorView& stats, const TensorView& workspace, int threads) {
  const Checker& check = kAdd;
  const Rows shape = check_activations(check, "x", x, 1);
  check_like(check, "residual", residual, "x", x, shape);
  check_same_shape(check, "residual", residual, "x", x);
  check_affine(check, affine, shape.width, true);
  check_dropout(check, dropout);
  check_like(check, "out", out, "x", x, shape);
  check_like(check, "total", total, "x", x, shape);
  check_stats(check, stats, shape);
  check_forward_workspace(check, workspace, shape.width, threads);
  OFAKERN_DISPATCH(add_layer_norm_forward, x, residual, affine, dropout, out, total, stats, workspace, threads);
}

void add_layer_norm_backward_cpu(const TensorView& dout, const TensorView& dtotal, const TensorView& total,
                                 const TensorView& stats, const LayerNormAffine& affine, const Dropout& dropout,
                                 const TensorView& dx, const TensorView& dresidual, const AffineGradients& gradients,
                                 const TensorView& workspace, int threads) {
  const Checker& check = kAdd;
  const Rows shape = check_activations(check, "total", total, 1);
  check_like(check, "dout", dout, "total", total, shape);
  if (dtotal.defined()) check_like(check, "dtotal", dtotal, "total", total, shape);
  check_stats(check, stats, shape);
  check_affine(check, affine, shape.width, false);
  check_dropout(check, dropout);
  if (dropout.p > 0)
    check_like(check, "dx", dx, "total", total, shape);
  else
    check.absent("dx", dx, "without dropout, where dresidual is it");
  check_like(check, "dresidual", dresidual, "total", total, shape);
  check_gradients(check, gradients, shape.width);
  check.workspace("workspace", workspace, layer_norm_backward_workspace(shape.rows, shape.width, 0, threads));
  OFAKERN_DISPATCH(add_layer_norm_backward, dout, dtotal, total, stats, affine, dropout, dx, dresidual, gradients,
                   workspace, threads);
}

void gelu_layer_norm_forward_cpu(const TensorView& x, const LayerNormAffine& affine, const TensorView& out,
                                 const TensorView& stats, const TensorView& workspace, int threads) {
  const Checker& check = kGelu;
  const Rows shape = check_activations(check, "x", x, 1);
  check_affine(check, affine, shape.width, true);
  check_like(check, "out", out, "x", x, shape);
  check_stats(check, stats, shape);
  check_forward_workspace(check, workspace, shape.width, threads);
  OFAKERN_DISPATCH(gelu_layer_norm_forward, x, affine, out, stats, workspace, threads);
}

void gelu_layer_norm_backward_cpu(const TensorView& dout, const TensorView& x, const TensorView& stats,
                                  const LayerNormAffine& affine, const TensorView& dx, const AffineGradients& gradients,
                                  const TensorView& workspace, int threads) {
  const Checker& check = kGelu;
  const Rows shape = check_activations(check, "x", x, 1);
  check_like(check, "dout", dout, "x", x, shape);
  check_stats(check, stats, shape);
  check_affine(check, affine, shape.width, false);
  check_like(check, "dx", dx, "x", x, shape);
  check_gradients(check, gradients, shape.width);
  check.workspace("workspace", workspace, layer_norm_backward_workspace(shape.rows, shape.width, 0, threads));
  OFAKERN_DISPATCH(gelu_layer_norm_backward, dout, x, stats, affine, dx, gradients, workspace, threads);
}

namespace {

// x [N, H, K] and the scale of its heads.
Rows check_heads(const Checker& check, const TensorView& x, const TensorView& head_scale) {
  check.given("x", x);
  check.ndim("x", x, 3, "[N, H, K]");
  const Rows shape = check_activations(check, "x", x, 2);
  check.plain("head_scale", head_scale, "[H]", {x.shape[1]}, DType::f32);
  return shape;
}

}  // namespace

void head_scale_layer_norm_forward_cpu(const TensorView& x, const TensorView& head_scale, const LayerNormAffine& affine,
                                       const TensorView& out, const TensorView& stats, const TensorView& workspace,
                                       int threads) {
  const Checker& check = kHead;
  const Rows shape = check_heads(check, x, head_scale);
  check_affine(check, affine, shape.width, true);
  check_like(check, "out", out, "x", x, shape);
  check_stats(check, stats, shape);
  check_forward_workspace(check, workspace, shape.width, threads);
  OFAKERN_DISPATCH(head_scale_layer_norm_forward, x, head_scale, affine, out, stats, workspace, threads);
}

void head_scale_layer_norm_backward_cpu(const TensorView& dout, const TensorView& x, const TensorView& head_scale,
                                        const TensorView& stats, const LayerNormAffine& affine, const TensorView& dx,
                                        const TensorView& dhead_scale, const AffineGradients& gradients,
                                        const TensorView& workspace, int threads) {
  const Checker& check = kHead;
  const Rows shape = check_heads(check, x, head_scale);
  check_like(check, "dout", dout, "x", x, shape);
  check_stats(check, stats, shape);
  check_affine(check, affine, shape.width, false);
  check_like(check, "dx", dx, "x", x, shape);
  check.plain("dhead_scale", dhead_scale, "[H]", {x.shape[1]}, DType::f32);
  check_gradients(check, gradients, shape.width);
  check.workspace("workspace", workspace, layer_norm_backward_workspace(shape.rows, shape.width, x.shape[1], threads));
  OFAKERN_DISPATCH(head_scale_layer_norm_backward, dout, x, head_scale, stats, affine, dx, dhead_scale, gradients,
                   workspace, threads);
}

void embed_layer_norm_forward_cpu(const EmbedInputs& in, const LayerNormAffine& affine, const TensorView& out,
                                  const TensorView& stats, const TensorView& workspace, int threads) {
  const Checker& check = kEmbed;
  const Rows shape = check_embed(check, in);
  check_affine(check, affine, shape.width, true);
  check_like(check, "out", out, "table", in.table, shape);
  check_stats(check, stats, shape);
  check_forward_workspace(check, workspace, shape.width, threads);
  OFAKERN_DISPATCH(embed_layer_norm_forward, in, affine, out, stats, workspace, threads);
}

void embed_layer_norm_backward_cpu(const TensorView& dout, const EmbedInputs& in, const TensorView& stats,
                                   const LayerNormAffine& affine, const TensorView& dtable,
                                   const TensorView& dtype_table, bool zeros, const AffineGradients& gradients,
                                   const TensorView& workspace, int threads) {
  const Checker& check = kEmbed;
  const Rows shape = check_embed(check, in);
  check_like(check, "dout", dout, "table", in.table, shape);
  check_stats(check, stats, shape);
  check_affine(check, affine, shape.width, false);
  const std::int64_t entries = in.table.shape[0];
  check.plain("dtable", dtable, "[V, D]", {entries, shape.width}, in.table.dtype);
  std::int64_t types = 0;
  if (in.type_table.defined()) {
    types = in.type_table.shape[0];
    check.plain("dtype_table", dtype_table, "[T, D]", {types, shape.width}, in.table.dtype);
  } else {
    check.absent("dtype_table", dtype_table, "where type_table is None");
  }
  check_gradients(check, gradients, shape.width);
  check.workspace("workspace", workspace,
                  embed_layer_norm_backward_workspace(shape.rows, shape.width, entries + types, threads));
  OFAKERN_DISPATCH(embed_layer_norm_backward, dout, in, stats, affine, dtable, dtype_table, zeros, gradients, workspace,
                   threads);
}

}  // namespace ofakern

// Checks every argument against the contract in decode_layers.h, then calls the active instruction set's kernel.
#include "ops/decode_layers/decode_layers.h"

#include <cstring>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/isa.h"
#include "ops/decode_attention/decode_attention.h"
#include "ops/decode_linear/decode_linear.h"

namespace ofakern {

OFAKERN_DECLARE_FOR_EACH_ISA(std::int64_t decode_layers_workspace(const StepModel& model, const StepInputs& in,
                                                                  int threads);
                             void decode_layers(const StepModel& model, const StepInputs& in, const TensorView& out,
                                                void* workspace, int threads);)

namespace {

constexpr Checker kCheck("decode_layers");

std::string at(std::int64_t layer, const char* name) { return "layers[" + std::to_string(layer) + "]." + name; }

void check_vector(const std::string& argument, const TensorView& x, const char* letters, std::int64_t size) {
  if (x.defined()) kCheck.plain(argument.c_str(), x, letters, {size}, DType::f32);
}

void check_norm(const std::string& argument, const StepNorm& norm, std::int64_t width, bool needed) {
  kCheck.that(norm.weight.defined() == norm.bias.defined() && (norm.weight.defined() || !needed), argument.c_str(),
              "have a weight and a bias", "weight " + describe(norm.weight) + ", bias " + describe(norm.bias));
  check_vector(argument + ".weight", norm.weight, "[D]", width);
  check_vector(argument + ".bias", norm.bias, "[D]", width);
}

// A product of one row tells whether the weight is whole and what it multiplies; its width is the result's.
void check_projection(const std::string& argument, const StepProjection& projection, DType dtype, std::int64_t width,
                      std::int64_t depth) {
  static float row[1] = {};
  DecodeLinearInputs inputs = {};
  inputs.x.data = row;
  inputs.x.dtype = dtype;
  inputs.x.ndim = 2;
  inputs.x.shape[1] = depth;
  inputs.x.stride[0] = depth;
  inputs.x.stride[1] = 1;
  inputs.packed = projection.packed;
  inputs.scale = projection.scale;
  inputs.bias = projection.bias;
  const PackedHeader header = decode_linear_header(inputs);
  kCheck.that(header.n == width, argument.c_str(), "give " + std::to_string(width) + " outputs",
              std::to_string(header.n));
}

void check_layer(const StepModel& model, std::int64_t l) {
  const StepLayer& layer = model.layers[l];
  const std::int64_t width = model.width;
  check_projection(at(l, "own"), layer.own, model.dtype, 3 * width, width);
  check_projection(at(l, "own_out"), layer.own_out, model.dtype, width, width);
  check_projection(at(l, "cross"), layer.cross, model.dtype, width, width);
  check_projection(at(l, "cross_out"), layer.cross_out, model.dtype, width, width);
  check_projection(at(l, "fc1"), layer.fc1, model.dtype, model.hidden, width);
  check_projection(at(l, "fc2"), layer.fc2, model.dtype, width, model.hidden);
  check_norm(at(l, "own_norm"), layer.own_norm, width, true);
  check_norm(at(l, "own_extra"), layer.own_extra, width, false);
  check_norm(at(l, "cross_norm"), layer.cross_norm, width, true);
  check_norm(at(l, "cross_extra"), layer.cross_extra, width, false);
  check_norm(at(l, "final_norm"), layer.final_norm, width, true);
  check_norm(at(l, "ffn_norm"), layer.ffn_norm, model.hidden, false);
  check_vector(at(l, "own_heads"), layer.own_heads, "[H]", model.heads);
  check_vector(at(l, "cross_heads"), layer.cross_heads, "[H]", model.heads);
  check_vector(at(l, "residual"), layer.residual, "[D]", width);
}

// Every slot is one of the cache's; rows that share one would overwrite each other's keys.
void check_slots(const StepInputs& in, std::int64_t rows) {
  kCheck.plain("slots", in.slots, "[R]", {rows}, DType::i32);
  const std::int64_t room = in.caches[0].own_keys.shape[0];
  std::vector<bool> taken(static_cast<std::size_t>(room));
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int32_t slot = in.slots.as<const std::int32_t>()[r];
    if (slot < 0 || slot >= room || taken[static_cast<std::size_t>(slot)])
      kCheck.fail_value("slots[" + std::to_string(r) + "]",
                        "be a slot of the cache (" + std::to_string(room) + ") of its own", std::to_string(slot));
    taken[static_cast<std::size_t>(slot)] = true;
  }
}

void check_caches(const StepModel& model, const StepInputs& in) {
  const std::int64_t head_width = model.width / model.heads;
  for (std::int64_t l = 0; l < model.count; ++l) {
    const StepCaches& caches = in.caches[l];
    kCheck.given("own_keys", caches.own_keys);
    kCheck.that(caches.own_keys.ndim == 3, "own_keys", "have shape [S, H, K]", describe(caches.own_keys));
    const std::int64_t room = in.caches[0].own_keys.shape[0];
    kCheck.plain("own_keys", caches.own_keys, "[S, H, K]", {room, model.heads, head_width}, model.dtype);
    kCheck.plain("own_values", caches.own_values, "[S, H, K]", {room, model.heads, head_width}, model.dtype);
    kCheck.given("runs", caches.runs);
    kCheck.given("source_keys", caches.source_keys);
    kCheck.that(caches.source_keys.dtype == model.dtype, "source_keys", "have x's dtype", describe(caches.source_keys));
  }
}

DecodeAttentionInputs attention_of(const StepModel& model, const StepInputs& in, std::int64_t l, bool own) {
  const StepCaches& caches = in.caches[l];
  DecodeAttentionInputs a = {};
  a.q = in.x;
  a.q.ndim = 3;
  a.q.shape[1] = model.heads;
  a.q.shape[2] = a.q.stride[1] = a.value_width = model.width / model.heads;
  a.q.stride[2] = 1;
  a.keys = own ? caches.own_keys : caches.source_keys;
  a.values = own ? caches.own_values : caches.source_values;
  a.row_offsets = in.row_offsets;
  if (own) {
    a.slots = in.table;
    a.counts = in.counts;
    a.bias = in.own_bias;
    if (a.bias.defined()) {
      a.bias.ndim = 2;
      for (int d = 0; d < 2; ++d) {
        a.bias.shape[d] = in.own_bias.shape[d + 1];
        a.bias.stride[d] = in.own_bias.stride[d + 1];
      }
    }
  } else {
    a.runs = caches.runs;
    a.bias = in.cross_bias;
  }
  return a;
}

void check_inputs(const StepModel& model, const StepInputs& in) {
  kCheck.plain("x", in.x, "[R, D]", {-1, model.width}, model.dtype);
  check_caches(model, in);
  check_slots(in, in.x.shape[0]);
  if (in.own_bias.defined()) {
    kCheck.plain("own_bias", in.own_bias, "[L or 1, H, sum of counts]", {-1, model.heads, -1}, DType::f32);
    kCheck.that(in.own_bias.shape[0] == 1 || in.own_bias.shape[0] == model.count, "own_bias",
                "be of every layer or of all of them", describe(in.own_bias));
  }
  for (std::int64_t l = 0; l < model.count; ++l)
    for (const bool own : {true, false}) check_decode_attention(attention_of(model, in, l, own));
  PackedHeader header;
  std::memcpy(&header, model.layers[0].own.packed.data, sizeof header);
  if (header.isa != static_cast<std::int32_t>(active_isa()))
    kCheck.fail_value("layers", std::string("be packed for the active instruction set ") + name_of(active_isa()),
                      name_of(static_cast<Isa>(header.isa)),
                      "prepare them again after the instruction set was changed");
}

}  // namespace

void check_step_model(const StepModel& model) {
  kCheck.that(model.count >= 1, "layers", "not be empty", "none");
  kCheck.that(model.heads >= 1 && model.width % model.heads == 0, "heads", "divide D", std::to_string(model.heads));
  check_norm("finish", model.finish, model.width, false);
  for (std::int64_t l = 0; l < model.count; ++l) check_layer(model, l);
}

std::int64_t decode_layers_workspace(const StepModel& model, const StepInputs& inputs, int threads) {
  check_inputs(model, inputs);
  return OFAKERN_DISPATCH(decode_layers_workspace, model, inputs, threads);
}

void decode_layers_cpu(const StepModel& model, const StepInputs& inputs, const TensorView& out,
                       const TensorView& workspace, int threads) {
  kCheck.plain("out", out, "[R, D]", {inputs.x.shape[0], model.width}, model.dtype);
  kCheck.workspace("workspace", workspace, decode_layers_workspace(model, inputs, threads));
  OFAKERN_DISPATCH(decode_layers, model, inputs, out, workspace.data, threads);
}

}  // namespace ofakern

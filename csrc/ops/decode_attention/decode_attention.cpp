// Checks every argument (decode_attention_check.cpp), then calls the active instruction set's kernel.
#include "ops/decode_attention/decode_attention.h"

#include <string>

#include "core/check.h"
#include "core/isa.h"
#include "ops/decode_linear/decode_linear.h"

namespace ofakern {

OFAKERN_DECLARE_FOR_EACH_ISA(
    void decode_attention_pack(const TensorView& k, const TensorView& v, const TensorView& runs, const TensorView& keys,
                               const TensorView& values, int threads);
    std::int64_t decode_attention_project_workspace(const SourceProjection& source, int threads);
    void decode_attention_project(const SourceProjection& source, const void* panels, const TensorView& keys,
                                  const TensorView& values, void* workspace, int threads);
    std::int64_t decode_attention_workspace(const DecodeAttentionInputs& in, int threads);
    void decode_attention(const DecodeAttentionInputs& in, const TensorView& out, const TensorView& lse,
                          void* workspace, int threads);)

namespace {

constexpr Checker kCheck("decode_attention");

void check_widths(std::int64_t heads, std::int64_t key_width, std::int64_t value_width, const std::string& got) {
  kCheck.that(heads >= 1 && key_width >= 1 && value_width >= 1 && key_width <= kDecodeMaxWidth &&
                  value_width <= kDecodeMaxWidth,
              "k and v", "have heads and widths of at most 256", got);
}

// The storage of a packed source whose runs cover `tokens`.
void check_storage(const TensorView& keys, const TensorView& values, const TensorView& runs, DType dtype,
                   std::int64_t heads, std::int64_t key_width, std::int64_t value_width, std::int64_t tokens) {
  kCheck.plain("keys", keys, "[elements]", {-1}, dtype);
  const std::int64_t room = keys.shape[0] / (heads * packed_key_width(key_width, dtype));
  kCheck.plain("values", values, "[elements]", {room * heads * packed_value_width(value_width)}, dtype);
  kCheck.plain("runs", runs, "[B, 2]", {-1, 2}, DType::i32);
  kCheck.that(check_decode_runs(runs, room) == tokens, "runs", "cover all tokens (" + std::to_string(tokens) + ")",
              "others");
}

// The weight's header, after the checks of decode_linear.
PackedHeader check_projection(const SourceProjection& in) {
  const PackedHeader header = decode_linear_header({in.states, in.packed, TensorView{}, in.bias});
  const std::int64_t width = in.heads * (in.key_width + in.value_width);
  check_widths(in.heads, in.key_width, in.value_width,
               std::to_string(in.heads) + ", " + std::to_string(in.key_width) + ", " + std::to_string(in.value_width));
  kCheck.that(header.n == width, "packed", "have H * (K + Kv) rows (" + std::to_string(width) + ")",
              std::to_string(header.n));
  return header;
}

}  // namespace

void decode_attention_pack(const TensorView& k, const TensorView& v, const TensorView& runs, const TensorView& keys,
                           const TensorView& values, int threads) {
  const std::initializer_list<DType> dtypes = {DType::f32, DType::bf16, DType::f16, DType::u8};
  check_decode_part("k", k, "[N, H, K]", {-1, -1, -1}, dtypes);
  check_decode_part("v", v, "[N, H, Kv]", {k.shape[0], k.shape[1], -1}, {k.dtype});
  const std::int64_t heads = k.shape[1], key_width = k.shape[2], value_width = v.shape[2];
  check_widths(heads, key_width, value_width, describe(k) + " and " + describe(v));
  check_storage(keys, values, runs, k.dtype, heads, key_width, value_width, k.shape[0]);
  OFAKERN_DISPATCH(decode_attention_pack, k, v, runs, keys, values, threads);
}

std::int64_t decode_attention_project_workspace(const SourceProjection& source, int threads) {
  check_projection(source);
  kCheck.plain("runs", source.runs, "[B, 2]", {-1, 2}, DType::i32);
  return OFAKERN_DISPATCH(decode_attention_project_workspace, source, threads);
}

void decode_attention_project(const SourceProjection& source, const TensorView& keys, const TensorView& values,
                              const TensorView& workspace, int threads) {
  check_projection(source);
  check_storage(keys, values, source.runs, source.states.dtype, source.heads, source.key_width, source.value_width,
                source.states.shape[0]);
  kCheck.workspace("workspace", workspace, OFAKERN_DISPATCH(decode_attention_project_workspace, source, threads));
  OFAKERN_DISPATCH(decode_attention_project, source, source.packed.as<const char>() + kPackedHeaderBytes, keys, values,
                   workspace.data, threads);
}

std::int64_t decode_attention_workspace(const DecodeAttentionInputs& inputs, int threads) {
  check_decode_attention(inputs);
  return OFAKERN_DISPATCH(decode_attention_workspace, inputs, threads);
}

void decode_attention_cpu(const DecodeAttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                          const TensorView& workspace, int threads) {
  check_decode_attention(inputs);
  check_decode_attention_results(inputs, out, lse);
  kCheck.workspace("workspace", workspace, OFAKERN_DISPATCH(decode_attention_workspace, inputs, threads));
  OFAKERN_DISPATCH(decode_attention, inputs, out, lse, workspace.data, threads);
}

}  // namespace ofakern

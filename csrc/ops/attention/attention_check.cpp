// The checks that every backend shares: each argument against the contract in attention.h.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/check.h"
#include "ops/attention/attention_checked.h"

namespace ofakern {
namespace {

constexpr std::int64_t kMaxWidth = 256;

constexpr Checker kCheck("attention");

// Words for what is wrong are made only when it is: a call passes here before any work.

void check_width(const char* argument, std::int64_t width) {
  if (width <= 0 || width % 8 != 0 || width > kMaxWidth)
    kCheck.fail_value(argument, "have a width that is a multiple of 8, at most 256", std::to_string(width));
}

void check_operand(const char* argument, const TensorView& x, const char* letters, std::int64_t tokens,
                   std::int64_t heads, const TensorView& like) {
  kCheck.shape(argument, x, letters, {tokens, heads, -1});
  kCheck.same_dtype(argument, x, "q", like);
  kCheck.device(argument, x);
  kCheck.last_contiguous(argument, x);
  check_width(argument, x.shape[2]);
}

// Offsets start at 0, never fall, and end at the token count: what the kernels index by.
void check_offsets(const char* argument, const TensorView& offsets, std::int64_t samples, std::int64_t tokens) {
  const std::int32_t* o = offsets.as<const std::int32_t>();
  bool rising = o[0] == 0 && o[samples] == tokens;
  for (std::int64_t s = 0; s < samples; ++s) rising = rising && o[s] <= o[s + 1];
  if (!rising)
    kCheck.fail_value(argument, "rise from 0 to the token count " + std::to_string(tokens),
                      "first " + std::to_string(o[0]) + ", last " + std::to_string(o[samples]));
}

[[noreturn]] void fail_range(const std::string& rule, const std::int32_t* range, std::int64_t sample) {
  kCheck.fail_value("layout.k_range", rule,
                    "[" + std::to_string(range[2 * sample]) + ", " + std::to_string(range[2 * sample + 1]) +
                        ") for sample " + std::to_string(sample));
}

// Shapes alone.
void check_layout(const AttentionLayoutView& layout, std::int64_t queries, std::int64_t keys) {
  kCheck.given("layout.q_offsets", layout.q_offsets);
  kCheck.ndim("layout.q_offsets", layout.q_offsets, 1, "[B + 1]");
  const std::int64_t samples = layout.q_offsets.shape[0] - 1;
  kCheck.that(samples >= 0, "layout.q_offsets", "have B + 1 entries", "none");
  kCheck.plain("layout.q_offsets", layout.q_offsets, "[B + 1]", {samples + 1}, DType::i32);
  kCheck.plain("layout.k_offsets", layout.k_offsets, "[B + 1]", {samples + 1}, DType::i32);
  kCheck.plain("layout.visible", layout.visible, "[Nq, 2]", {queries, 2}, DType::i32);
  kCheck.plain("layout.key_seen", layout.key_seen, "[Nk]", {keys}, DType::u8);
  kCheck.plain("layout.k_range", layout.k_range, "[B, 2]", {samples, 2}, DType::i32);
}

std::int64_t longest(const TensorView& offsets, const TensorView& members, std::int32_t from, std::int32_t to) {
  const std::int32_t *o = offsets.as<const std::int32_t>(), *m = members.as<const std::int32_t>();
  std::int64_t length = 0;
  for (std::int32_t at = from; at < to; ++at) length = std::max<std::int64_t>(length, o[m[at] + 1] - o[m[at]]);
  return length;
}

// Every sample stands in one set, every set's rows are there, and nobody sees another sample's keys.
void check_shared(const AttentionLayoutView& layout, std::int64_t q_rows, std::int64_t k_rows) {
  const std::int64_t samples = layout.q_offsets.shape[0] - 1;
  const TensorView &sets = layout.shared.sets, &members = layout.shared.members;
  kCheck.plain("layout.shared.sets", sets, "[U, 4]", {-1, 4}, DType::i32);
  kCheck.given("layout.shared.members", members);
  kCheck.plain("layout.shared.members", members, "[B]", {samples}, DType::i32);
  std::vector<bool> found(static_cast<std::size_t>(samples));
  bool once = true;
  for (std::int64_t at = 0; at < samples; ++at) {
    const std::int32_t sample = members.as<const std::int32_t>()[at];
    once = once && 0 <= sample && sample < samples && !found[static_cast<std::size_t>(sample)];
    if (once) found[static_cast<std::size_t>(sample)] = true;
  }
  kCheck.that(once, "layout.shared.members", "have every sample once", "others");
  std::int64_t place = 0;
  for (std::int64_t u = 0; u < sets.shape[0]; ++u) {
    const std::int32_t* set = sets.as<const std::int32_t>() + 4 * u;
    kCheck.that(set[0] == place && place <= set[1] && set[1] <= samples, "layout.shared.sets",
                "take the members one after the other",
                std::to_string(set[0]) + ", " + std::to_string(set[1]) + " for set " + std::to_string(u));
    place = set[1];
    kCheck.that(0 <= set[2] && set[2] + longest(layout.q_offsets, members, set[0], set[1]) <= q_rows, "q_pos",
                "have the rows of every set of samples", std::to_string(q_rows));
    kCheck.that(0 <= set[3] && set[3] + longest(layout.k_offsets, members, set[0], set[1]) <= k_rows, "k_pos",
                "have the rows of every set of samples", std::to_string(k_rows));
  }
  kCheck.that(place == samples, "layout.shared.sets", "take every member", std::to_string(place));
  const std::int32_t *range = layout.k_range.as<const std::int32_t>(),
                     *keys = layout.k_offsets.as<const std::int32_t>();
  for (std::int64_t s = 0; s < samples; ++s)
    if (range[2 * s] != range[2 * s + 1] && (range[2 * s] < keys[s] || range[2 * s + 1] > keys[s + 1]))
      fail_range("lie inside the sample's keys where samples share positions", range, s);
}

void check_gradient(const char* argument, const TensorView& gradient, const TensorView& of) {
  if (!of.defined()) {
    kCheck.absent(argument, gradient, "its input was not given");
    return;
  }
  kCheck.plain(argument, gradient, "its input's shape", {of.shape[0], of.shape[1], of.shape[2]}, of.dtype);
}

}  // namespace

void check_attention_shapes(const AttentionInputs& in) {
  kCheck.given("q", in.q);
  kCheck.dtype("q", in.q, {DType::f32, DType::bf16, DType::f16});
  kCheck.ndim("q", in.q, 3, "[Nq, H, K]");
  kCheck.given("k", in.k);
  kCheck.ndim("k", in.k, 3, "[Nk, Hk, K]");
  const std::int64_t queries = in.q.shape[0], heads = in.q.shape[1], keys = in.k.shape[0], key_heads = in.k.shape[1];
  if (heads <= 0 || key_heads <= 0 || heads % key_heads != 0)
    kCheck.fail_value("H", "be a multiple of k's heads (" + std::to_string(key_heads) + ")", std::to_string(heads));
  check_operand("q", in.q, "[Nq, H, K]", queries, heads, in.q);
  check_operand("k", in.k, "[Nk, Hk, K]", keys, key_heads, in.q);
  kCheck.shape("k", in.k, "[Nk, Hk, K]", {keys, key_heads, in.q.shape[2]});
  kCheck.given("v", in.v);
  check_operand("v", in.v, "[Nk, Hk, V]", keys, key_heads, in.q);
  const bool shared = in.layout.shared.sets.defined();
  if (in.q_pos.defined() || in.k_pos.defined()) {
    kCheck.given("q_pos", in.q_pos);
    kCheck.given("k_pos", in.k_pos);
    check_operand("q_pos", in.q_pos, shared ? "[rows, H, P]" : "[Nq, H, P]", shared ? -1 : queries, heads, in.q);
    check_operand("k_pos", in.k_pos, shared ? "[rows, Hk, P]" : "[Nk, Hk, P]", shared ? -1 : keys, key_heads, in.q);
    kCheck.shape("k_pos", in.k_pos, "[Nk, Hk, P]", {-1, key_heads, in.q_pos.shape[2]});
  }
  static constexpr const char* kTables[2] = {"tables[0]", "tables[1]"};
  for (int t = 0; t < 2; ++t) {
    const RelativeTermView& term = in.terms[t];
    if (!term.table.defined()) continue;
    kCheck.plain(kTables[t], term.table, "[H, R]", {heads, -1}, DType::f32);
    kCheck.plain("terms.q_coord", term.q_coord, "[Nq]", {queries}, DType::i32);
    kCheck.plain("terms.k_coord", term.k_coord, "[Nk]", {keys}, DType::i32);
    kCheck.plain("terms.same", term.same, "[Nq, 2]", {queries, 2}, DType::i32);
  }
  if (in.head_scale.defined()) kCheck.plain("head_scale", in.head_scale, "[H]", {heads}, DType::f32);
  if (!std::isfinite(in.scale)) kCheck.fail_value("scale", "be finite", std::to_string(in.scale));
  if (!(in.dropout_p >= 0 && in.dropout_p < 1))
    kCheck.fail_value("dropout_p", "be in [0, 1)", std::to_string(in.dropout_p));
  if (in.dropout_p > 0) kCheck.plain("dropout_seed", in.dropout_seed, "[2]", {2}, DType::i64);
  check_layout(in.layout, queries, keys);
}

namespace {

void check_values(const AttentionLayoutView& layout, std::int64_t queries, std::int64_t keys, std::int64_t q_rows,
                  std::int64_t k_rows) {
  if (layout.k_range.device != Device::cpu) return;
  const std::int64_t samples = layout.k_range.shape[0];
  check_offsets("layout.q_offsets", layout.q_offsets, samples, queries);
  check_offsets("layout.k_offsets", layout.k_offsets, samples, keys);
  const std::int32_t* range = layout.k_range.as<const std::int32_t>();
  for (std::int64_t s = 0; s < samples; ++s)
    if (range[2 * s] < 0 || range[2 * s] > range[2 * s + 1] || range[2 * s + 1] > keys)
      fail_range("lie inside the keys (" + std::to_string(keys) + ")", range, s);
  if (layout.shared.sets.defined()) check_shared(layout, q_rows, k_rows);
}

}  // namespace

void check_attention_layout(const AttentionLayoutView& layout, std::int64_t queries, std::int64_t keys,
                            std::int64_t q_rows, std::int64_t k_rows) {
  check_layout(layout, queries, keys);
  check_values(layout, queries, keys, q_rows, k_rows);
}

void check_attention(const AttentionInputs& in) {
  check_attention_shapes(in);
  AttentionLayoutView layout = in.layout;
  if (!in.q_pos.defined()) layout.shared = {};  // nothing is shared then
  check_values(layout, in.q.shape[0], in.k.shape[0], in.q_pos.shape[0], in.k_pos.shape[0]);
}

void check_attention_results(const AttentionInputs& in, const TensorView& out, const TensorView& lse) {
  const std::int64_t queries = in.q.shape[0], heads = in.q.shape[1];
  kCheck.plain("out", out, "[Nq, H, V]", {queries, heads, in.v.shape[2]}, in.q.dtype);
  kCheck.plain("lse", lse, "[Nq, H]", {queries, heads}, DType::f32);
}

void check_attention_gradients(const AttentionInputs& inputs, const TensorView& dout, const TensorView& dlse,
                               const AttentionGradients& gradients) {
  kCheck.given("dout", dout);
  kCheck.shape("dout", dout, "[Nq, H, V]", {inputs.q.shape[0], inputs.q.shape[1], inputs.v.shape[2]});
  kCheck.same_dtype("dout", dout, "q", inputs.q);
  kCheck.device("dout", dout);
  kCheck.last_contiguous("dout", dout);
  if (dlse.defined()) kCheck.plain("dlse", dlse, "[Nq, H]", {inputs.q.shape[0], inputs.q.shape[1]}, DType::f32);
  check_gradient("dq", gradients.dq, inputs.q);
  check_gradient("dk", gradients.dk, inputs.k);
  check_gradient("dv", gradients.dv, inputs.v);
  check_gradient("dq_pos", gradients.dq_pos, inputs.q_pos);
  check_gradient("dk_pos", gradients.dk_pos, inputs.k_pos);
  static constexpr const char* kTables[2] = {"dtables[0]", "dtables[1]"};
  for (int t = 0; t < 2; ++t) {
    const TensorView& table = inputs.terms[t].table;
    if (table.defined())
      kCheck.plain(kTables[t], gradients.dtables[t], "[H, R]", {table.shape[0], table.shape[1]}, DType::f32);
    else
      kCheck.absent(kTables[t], gradients.dtables[t], "the call has no such term");
  }
  if (inputs.head_scale.defined())
    kCheck.plain("dhead_scale", gradients.dhead_scale, "[H]", {inputs.head_scale.shape[0]}, DType::f32);
  else
    kCheck.absent("dhead_scale", gradients.dhead_scale, "head_scale was not given");
}

}  // namespace ofakern

// Checks every argument against the contract in decode_attention.h, for all of its backends.
#include <string>

#include "core/check.h"
#include "ops/decode_attention/decode_attention.h"

namespace ofakern {
namespace {

constexpr Checker kCheck("decode_attention");

void check_whole(const char* argument, const TensorView& x, const char* letters,
                 std::initializer_list<std::int64_t> sizes, std::initializer_list<DType> dtypes) {
  check_decode_part(argument, x, letters, sizes, dtypes);
  kCheck.contiguous(argument, x);
}

std::string at(const char* name, std::int64_t index) { return std::string(name) + "[" + std::to_string(index) + "]"; }

// The padded keys that the runs cover, each of them inside a storage for `room`.
std::int64_t check_runs(const TensorView& runs, std::int64_t room) {
  const std::int32_t* run = runs.as<const std::int32_t>();
  std::int64_t total = 0;
  for (std::int64_t b = 0; b < runs.shape[0]; ++b) {
    const std::int64_t first = run[2 * b], count = run[2 * b + 1];
    if (first < 0 || first % kDecodeBlock != 0 || count < 0 || first + packed_count(count) > room)
      kCheck.fail_value(at("runs", b), "begin at a block and lie in the cache's " + std::to_string(room) + " keys",
                        std::to_string(first) + ", " + std::to_string(count));
    total += count;
  }
  return total;
}

void check_rows(const TensorView& row_offsets, std::int64_t rows) {
  const std::int64_t samples = row_offsets.shape[0] - 1;
  const std::int32_t* offset = row_offsets.as<const std::int32_t>();
  bool ordered = offset[0] == 0 && offset[samples] == rows;
  for (std::int64_t b = 0; b < samples; ++b) ordered = ordered && offset[b] <= offset[b + 1];
  kCheck.that(ordered, "row_offsets", "rise from 0 to R (" + std::to_string(rows) + ")",
              std::to_string(offset[0]) + " .. " + std::to_string(offset[samples]));
}

// Every slot that will be read lies in the cache. Returns the sum of counts.
std::int64_t check_slots(const DecodeAttentionInputs& in, std::int64_t samples) {
  const std::int32_t* counts = in.counts.as<const std::int32_t>();
  const std::int32_t* offset = in.row_offsets.as<const std::int32_t>();
  const std::uint32_t room = static_cast<std::uint32_t>(in.keys.shape[0]);
  std::int64_t total = 0;
  for (std::int64_t b = 0; b < samples; ++b) {
    if (counts[b] < 0 || counts[b] > in.slots.shape[1])
      kCheck.fail_value(at("counts", b), "be in 0..T (" + std::to_string(in.slots.shape[1]) + ")",
                        std::to_string(counts[b]));
    total += counts[b];
    for (std::int64_t r = offset[b]; r < offset[b + 1]; ++r) {
      const std::int32_t* row = in.slots.as<const std::int32_t>() + r * in.slots.stride[0];
      bool inside = true;
      for (std::int32_t j = 0; j < counts[b]; ++j) inside &= static_cast<std::uint32_t>(row[j]) < room;
      if (!inside)
        kCheck.fail_value(at("slots", r),
                          "name slots of the cache (" + std::to_string(room) + ") in its first " +
                              std::to_string(counts[b]) + " steps",
                          "another");
    }
  }
  return total;
}

std::int64_t room_of_blocks(const DecodeAttentionInputs& in) {
  return in.keys.shape[0] / (in.q.shape[1] * packed_key_width(in.q.shape[2], in.keys.dtype));
}

void check_scales(const DecodeAttentionInputs& in, std::int64_t first, std::int64_t second, bool blocks) {
  if (in.keys.dtype != DType::u8) {
    kCheck.absent("key_scales", in.key_scales, "when the cache is not int8");
    kCheck.absent("value_scales", in.value_scales, "when the cache is not int8");
  } else if (blocks) {
    check_whole("key_scales", in.key_scales, "[keys * H]", {first * second}, {DType::f32});
    check_whole("value_scales", in.value_scales, "[keys * H]", {first * second}, {DType::f32});
  } else {
    check_whole("key_scales", in.key_scales, "[S, H]", {first, second}, {DType::f32});
    check_whole("value_scales", in.value_scales, "[S, H]", {first, second}, {DType::f32});
  }
}

// All but what stands in row_offsets, runs, slots and counts. blocks: of a source, as the CPU kernel packs it.
void check_tensors(const DecodeAttentionInputs& in, bool blocks) {
  check_whole("q", in.q, "[R, H, K]", {-1, -1, -1}, {DType::f32, DType::bf16, DType::f16});
  const std::int64_t heads = in.q.shape[1], width = in.q.shape[2];
  kCheck.that(heads >= 1 && width >= 1 && width <= kDecodeMaxWidth, "q", "have heads and a width of at most 256",
              describe(in.q));
  kCheck.that(in.value_width >= 1 && in.value_width <= kDecodeMaxWidth, "value_width", "be in 1..256",
              std::to_string(in.value_width));
  check_whole("row_offsets", in.row_offsets, "[B + 1]", {-1}, {DType::i32});
  const std::int64_t samples = in.row_offsets.shape[0] - 1;
  kCheck.that(samples >= 0, "row_offsets", "have an entry", describe(in.row_offsets));
  if (in.runs.defined()) {
    kCheck.absent("slots", in.slots, "when the keys are a source");
    kCheck.absent("counts", in.counts, "when the keys are a source");
    check_whole("runs", in.runs, "[B, 2]", {samples, 2}, {DType::i32});
  } else {
    check_decode_part("slots", in.slots, "[R, T]", {in.q.shape[0], -1}, {DType::i32});
    check_whole("counts", in.counts, "[B]", {samples}, {DType::i32});
  }
  if (in.runs.defined() && blocks) {
    check_whole("keys", in.keys, "[elements]", {-1}, {in.q.dtype, DType::u8});
    const std::int64_t room = room_of_blocks(in);
    check_whole("values", in.values, "[elements]", {room * heads * packed_value_width(in.value_width)},
                {in.keys.dtype});
    check_scales(in, room, heads, true);
  } else {
    check_whole("keys", in.keys, "[S, H, K]", {-1, heads, width}, {in.q.dtype, DType::u8});
    check_whole("values", in.values, "[S, H, Kv]", {in.keys.shape[0], heads, in.value_width}, {in.keys.dtype});
    check_scales(in, in.keys.shape[0], heads, false);
  }
  if (in.bias.defined()) check_decode_part("bias", in.bias, "[H, sum of counts]", {heads, -1}, {DType::f32});
  if (in.head_scale.defined()) check_whole("head_scale", in.head_scale, "[H]", {heads}, {DType::f32});
}

}  // namespace

void check_decode_part(const char* argument, const TensorView& x, const char* letters,
                       std::initializer_list<std::int64_t> sizes, std::initializer_list<DType> dtypes) {
  kCheck.given(argument, x);
  kCheck.dtype(argument, x, dtypes);
  kCheck.shape(argument, x, letters, sizes);
  kCheck.device(argument, x);
  kCheck.last_contiguous(argument, x);
}

std::int64_t check_decode_runs(const TensorView& runs, std::int64_t room) { return check_runs(runs, room); }

void check_decode_attention(const DecodeAttentionInputs& in) {
  check_tensors(in, true);
  check_rows(in.row_offsets, in.q.shape[0]);
  const std::int64_t total =
      in.runs.defined() ? check_runs(in.runs, room_of_blocks(in)) : check_slots(in, in.row_offsets.shape[0] - 1);
  if (in.bias.defined()) kCheck.shape("bias", in.bias, "[H, sum of counts]", {in.q.shape[1], total});
}

void check_decode_attention_cuda(const DecodeAttentionInputs& in) {
  check_tensors(in, false);
  kCheck.that(in.keys.shape[0] < INT32_MAX, "keys", "have fewer than 2**31 - 1 slots", describe(in.keys));
}

void check_decode_attention_results(const DecodeAttentionInputs& in, const TensorView& out, const TensorView& lse) {
  check_whole("out", out, "[R, H, Kv]", {in.q.shape[0], in.q.shape[1], in.value_width}, {in.q.dtype});
  check_whole("lse", lse, "[R, H]", {in.q.shape[0], in.q.shape[1]}, {DType::f32});
}

}  // namespace ofakern

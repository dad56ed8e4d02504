// The launches: which kernel takes a call, and how many blocks. Compiled by nvcc and, for tests, by the emulator.
#include <algorithm>

#include "ops/decode_attention/decode_attention_beams.cuh"
#include "ops/decode_attention/decode_attention_lanes.cuh"

namespace ofakern {
namespace {

bool is_aligned(const TensorView& x, std::uintptr_t bytes) {
  return reinterpret_cast<std::uintptr_t>(x.data) % bytes == 0;
}

i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// What follows from sizes alone.
struct AttendPlan {
  bool source, stored_int8, aligned, beams;
  i64 samples, longest, chunk, splits, row_parts, bytes;
};

AttendPlan plan_call(const DecodeAttentionInputs& in, i64 longest) {
  AttendPlan p = {};
  p.source = in.runs.defined();
  p.stored_int8 = in.keys.dtype == DType::u8;
  p.samples = in.row_offsets.shape[0] - 1;
  p.longest = p.source ? (longest > 0 ? std::min(longest, in.keys.shape[0]) : in.keys.shape[0]) : in.slots.shape[1];
  const i64 width = in.q.shape[2], rows = in.q.shape[0], heads = in.q.shape[1];
  p.aligned = width % 8 == 0 && in.value_width % 8 == 0 && is_aligned(in.keys, 16) && is_aligned(in.values, 16);
  p.beams = p.source && p.aligned && in.q.dtype != DType::f32 && std::max(width, in.value_width) <= 128 &&
            is_aligned(in.q, 16);
  p.chunk = p.beams ? kBeamChunk : kLaneChunk;
  p.splits = std::max<i64>(ceil_div(p.longest, p.chunk), 1);
  // Blocks for rows beyond a block's first ones: as many as the samples have on average.
  const i64 at_once = p.beams ? kBeamRows : kSharedRows;
  p.row_parts = std::min<i64>(std::max<i64>(ceil_div(rows, at_once * std::max<i64>(p.samples, 1)), 1), 64);
  p.bytes = p.splits > 1 ? 4 * p.splits * rows * heads * (in.value_width + 2) : 0;
  return p;
}

AttendCall call_of(const DecodeAttentionInputs& in, const AttendPlan& p, const TensorView& out, const TensorView& lse,
                   void* workspace) {
  AttendCall c = {};
  c.q = in.q.data;
  c.keys = in.keys.data;
  c.values = in.values.data;
  c.key_scales = in.key_scales.as<const float>();
  c.value_scales = in.value_scales.as<const float>();
  c.row_offsets = in.row_offsets.as<const int>();
  c.runs = in.runs.as<const int>();
  c.slots = in.slots.as<const int>();
  c.counts = in.counts.as<const int>();
  c.bias = in.bias.as<const float>();
  c.head_scale = in.head_scale.as<const float>();
  c.out = out.data;
  c.lse = lse.as<float>();
  c.parts = static_cast<float*>(workspace);
  c.slots_stride = in.slots.defined() ? in.slots.stride[0] : 0;
  c.bias_stride = in.bias.defined() ? in.bias.stride[0] : 0;
  c.bias_columns = in.bias.defined() ? in.bias.shape[1] : 0;
  c.room = static_cast<int>(in.keys.shape[0]);
  c.samples = static_cast<int>(p.samples);
  c.rows = static_cast<int>(in.q.shape[0]);
  c.heads = static_cast<int>(in.q.shape[1]);
  c.width = static_cast<int>(in.q.shape[2]);
  c.value_width = static_cast<int>(in.value_width);
  c.steps = in.slots.defined() ? static_cast<int>(in.slots.shape[1]) : 0;
  c.chunk = static_cast<int>(p.chunk);
  c.splits = static_cast<int>(p.splits);
  c.row_parts = static_cast<int>(p.row_parts);
  c.scale = static_cast<float>(in.scale);
  c.dtype = in.q.dtype;
  c.aligned = p.aligned;
  c.narrow = !p.beams && p.longest <= kWarpKeys;
  return c;
}

dim3 blocks_of(i64 count) { return dim3(static_cast<unsigned>(count)); }

template <class E, class S>
void launch_beams(const AttendCall& c, Stream stream) {
  const i64 blocks = static_cast<i64>(c.samples) * c.row_parts * c.splits * c.heads;
  if (std::max(c.width, c.value_width) <= 64)
    launch<attend_beams<E, S, 64>>(Grid{blocks_of(blocks), dim3(kBeamWarps * 32), beam_shared_bytes(64)}, stream, c);
  else
    launch<attend_beams<E, S, 128>>(Grid{blocks_of(blocks), dim3(kBeamWarps * 32), beam_shared_bytes(128)}, stream, c);
}

template <class S>
void launch_lanes(const AttendCall& c, Stream stream) {
  const i64 heads = c.narrow ? ceil_div(c.heads, kLaneWarps) : c.heads;
  const i64 outer = c.runs == nullptr ? c.rows : static_cast<i64>(c.samples) * c.row_parts;
  const Grid grid{blocks_of(outer * c.splits * heads), dim3(kLaneWarps * 32)};
  c.runs == nullptr ? launch<attend_slots<S>>(grid, stream, c) : launch<attend_source<S>>(grid, stream, c);
}

void launch_call(const AttendCall& c, const AttendPlan& p, Stream stream) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, float>)
      if (p.beams) return p.stored_int8 ? launch_beams<T, std::int8_t>(c, stream) : launch_beams<T, T>(c, stream);
    p.stored_int8 ? launch_lanes<std::int8_t>(c, stream) : launch_lanes<T>(c, stream);
  });
  if (p.splits > 1) {
    const i64 pairs = static_cast<i64>(c.rows) * c.heads;
    launch<merge_splits>(Grid{blocks_of(ceil_div(pairs, 4)), dim3(128)}, stream, c);
  }
}

}  // namespace

std::int64_t decode_attention_workspace_cuda(const DecodeAttentionInputs& in, std::int64_t longest) {
  return plan_call(in, longest).bytes;
}

void decode_attention_cuda(const DecodeAttentionInputs& in, std::int64_t longest, const TensorView& out,
                           const TensorView& lse, const TensorView& workspace, Stream stream) {
  const AttendPlan plan = plan_call(in, longest);
  if (in.q.shape[0] == 0 || (plan.source && plan.samples == 0)) return;
  launch_call(call_of(in, plan, out, lse, workspace.data), plan, stream);
}

}  // namespace ofakern

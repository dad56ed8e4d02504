// Attention backward on a GPU: its scratch memory and its launches. No atomics, and one owner for every sum: the bits
// follow from shapes alone.
#include "ops/attention/attention_cuda_backward_keys.cuh"
#include "ops/attention/attention_cuda_host.cuh"

namespace ofakern {
namespace {

constexpr int kRows = kWarps * 16;          // queries or keys of a block
constexpr std::int64_t kTableParts = 1024;  // blocks of threads over all heads that own a copy of the tables' gradients

struct BackwardScratch {
  QueryBlock *wide, *narrow;  // of kRows and of kStream queries
  KeyBlock* keys;
  PlanScratch plan;
  float* delta;
  float *table_parts[2], *scale_parts;
  std::int64_t wide_slots, narrow_slots, key_slots, parts, blocks_per_part;

  std::size_t carve(std::byte* base, const AttentionInputs& in) {
    Carver carver{base};
    const std::int64_t queries = queries_of(in), heads = in.q.shape[1];
    wide_slots = slots_of(queries, samples_of(in), kRows), narrow_slots = slots_of(queries, samples_of(in), kStream);
    key_slots = slots_of(keys_of(in), samples_of(in), kRows);
    wide = carver.take<QueryBlock>(wide_slots), narrow = carver.take<QueryBlock>(narrow_slots);
    keys = carver.take<KeyBlock>(key_slots);
    plan.carve(carver, in);
    delta = carver.take<float>(queries * heads);
    const bool terms = in.terms[0].table.defined() || in.terms[1].table.defined();
    parts = terms ? std::min(wide_slots, std::max<std::int64_t>(kTableParts / heads, 1)) : wide_slots;
    blocks_per_part = parts == 0 ? 0 : (wide_slots + parts - 1) / parts;
    for (int t = 0; t < 2; ++t) table_parts[t] = carver.take<float>(parts * in.terms[t].table.numel());
    scale_parts = carver.take<float>(parts * in.head_scale.numel());
    return carver.used;
  }
};

void launch_sum(const float* parts, std::int64_t count, const TensorView& out, Stream stream) {
  const std::int64_t elements = out.numel();
  if (elements == 0) return;
  simt::launch<attention_sum_parts>(
      simt::Grid{dim3(static_cast<unsigned>((elements + kThreads - 1) / kThreads)), dim3(kThreads)}, stream, parts,
      static_cast<int>(count), elements, out.as<float>());
}

simt::Grid grid_of(std::int64_t slots, std::int64_t heads, std::size_t shared_bytes) {
  return {dim3(static_cast<unsigned>(slots), static_cast<unsigned>(heads)), dim3(kThreads), shared_bytes};
}

template <class T, int kDepth, int kValue>
void launch_tiles(const Call& call, const Incoming& incoming, const AttentionGradients& gradients,
                  const BackwardScratch& scratch, Stream stream) {
  const QueryGradients of_queries{gradients.dq.data,
                                  gradients.dq_pos.data,
                                  scratch.delta,
                                  {scratch.table_parts[0], scratch.table_parts[1]},
                                  scratch.scale_parts,
                                  static_cast<int>(scratch.wide_slots),
                                  static_cast<int>(scratch.blocks_per_part)};
  if (scratch.parts > 0)
    simt::launch<attention_backward_queries<T, kDepth>>(
        grid_of(scratch.parts, call.heads, QueriesMemory<T>().carve(nullptr, call)), stream, call, incoming, of_queries,
        scratch.wide);
  const KeyGradients of_keys{gradients.dk.data, gradients.dv.data, gradients.dk_pos.data, scratch.delta};
  if (scratch.key_slots > 0)
    simt::launch<attention_backward_keys<T, kDepth, kValue>>(
        grid_of(scratch.key_slots, call.heads / call.group, KeysMemory<T>().carve(nullptr, call)), stream, call,
        incoming, of_keys, scratch.narrow, scratch.keys);
}

}  // namespace

std::int64_t attention_backward_workspace_cuda(const AttentionInputs& inputs) {
  check_attention(inputs);
  check_cuda(inputs);
  return static_cast<std::int64_t>(BackwardScratch().carve(nullptr, inputs));
}

void attention_backward_cuda(const AttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                             const TensorView& dout, const TensorView& dlse, const AttentionGradients& gradients,
                             const TensorView& workspace, Stream stream) {
  kCheck.workspace("workspace", workspace, attention_backward_workspace_cuda(inputs));
  check_attention_results(inputs, out, lse);
  check_attention_gradients(inputs, dout, dlse, gradients);
  check_rows("dout", dout);
  BackwardScratch scratch;
  scratch.carve(workspace.as<std::byte>(), inputs);
  const Call call = make_call(inputs, scratch.plan);
  Plans plans{};
  plans.queries[0] = scratch.wide, plans.rows[0] = kRows, plans.slots[0] = static_cast<int>(scratch.wide_slots);
  plans.queries[1] = scratch.narrow, plans.rows[1] = kStream, plans.slots[1] = static_cast<int>(scratch.narrow_slots);
  plans.keys = scratch.keys, plans.key_rows = kRows, plans.key_slots = static_cast<int>(scratch.key_slots);
  plans.query_list = 1;
  launch_plan(call, plans, scratch.plan, stream);
  const Incoming incoming{operand_of(dout), out.data, lse.as<const float>(), dlse.as<const float>()};
  const bool narrow = depth_of(call) <= 128 && call.v.width <= 64;
  with_half_type(inputs.q.dtype, [&](auto type) {
    using T = decltype(type);
    if (narrow)
      launch_tiles<T, 128, 64>(call, incoming, gradients, scratch, stream);
    else
      launch_tiles<T, 256, 128>(call, incoming, gradients, scratch, stream);
  });
  for (int t = 0; t < 2; ++t)
    if (gradients.dtables[t].defined()) launch_sum(scratch.table_parts[t], scratch.parts, gradients.dtables[t], stream);
  if (gradients.dhead_scale.defined()) launch_sum(scratch.scale_parts, scratch.parts, gradients.dhead_scale, stream);
}

}  // namespace ofakern

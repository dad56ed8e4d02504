// Attention forward on a GPU: its arguments as kernels take them, its scratch memory, and its launches.
#include "ops/attention/attention_cuda_forward.cuh"
#include "ops/attention/attention_cuda_host.cuh"

namespace ofakern {
namespace {

struct ForwardScratch {
  QueryBlock* queries;
  PlanScratch plan;
};

constexpr int rows_of_block(std::int64_t value_width) { return value_width <= 64 ? 128 : 64; }

std::size_t carve(ForwardScratch& scratch, std::byte* base, const AttentionInputs& in) {
  Carver carver{base};
  scratch.queries = carver.take<QueryBlock>(slots_of(queries_of(in), samples_of(in), rows_of_block(in.v.shape[2])));
  scratch.plan.carve(carver, in);
  return carver.used;
}

template <class T, int kM, int kValue>
void launch_forward(const Call& call, const ForwardScratch& scratch, const AttentionInputs& in, const TensorView& out,
                    const TensorView& lse, Stream stream) {
  using Memory = ForwardMemory<T, kM, kValue>;
  Plans plans{};
  plans.queries[0] = scratch.queries, plans.rows[0] = Memory::kRows;
  plans.slots[0] = static_cast<int>(slots_of(queries_of(in), samples_of(in), Memory::kRows));
  launch_plan(call, plans, scratch.plan, stream);
  simt::launch<attention_forward_tiles<T, kM, kValue>>(
      simt::Grid{dim3(static_cast<unsigned>(plans.slots[0]), static_cast<unsigned>(call.heads)), dim3(kThreads),
                 Memory().carve(nullptr, call)},
      stream, call, scratch.queries, out.as<T>(), lse.as<float>());
}

}  // namespace

std::int64_t attention_forward_workspace_cuda(const AttentionInputs& inputs) {
  check_attention(inputs);
  check_cuda(inputs);
  ForwardScratch scratch;
  return static_cast<std::int64_t>(carve(scratch, nullptr, inputs));
}

void attention_forward_cuda(const AttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                            const TensorView& workspace, Stream stream) {
  kCheck.workspace("workspace", workspace, attention_forward_workspace_cuda(inputs));
  check_attention_results(inputs, out, lse);
  if (queries_of(inputs) == 0) return;
  ForwardScratch scratch;
  carve(scratch, workspace.as<std::byte>(), inputs);
  const Call call = make_call(inputs, scratch.plan);
  with_half_type(inputs.q.dtype, [&](auto type) {
    using T = decltype(type);
    if (rows_of_block(inputs.v.shape[2]) == 128)
      launch_forward<T, 2, 64>(call, scratch, inputs, out, lse, stream);
    else
      launch_forward<T, 1, 128>(call, scratch, inputs, out, lse, stream);
  });
}

}  // namespace ofakern

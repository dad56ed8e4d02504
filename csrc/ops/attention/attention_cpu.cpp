// Compiled once per instruction set; see core/isa.h.
#include "core/with_type.h"
#include "ops/attention/attention_backward_tasks.h"
#include "ops/attention/attention_forward.h"

namespace ofakern::OFAKERN_ISA {
namespace {

template <class T>
OFAKERN_LOCAL i64 measure_forward(const AttentionInputs& in, int threads) {
  Problem<T> p = make_problem<T>(in);
  Arena arena(nullptr);
  ForwardMemory<T>::take(p, threads, arena);
  return arena.used();
}

template <class T>
OFAKERN_LOCAL i64 measure_backward(const AttentionInputs& in, int threads) {
  Problem<T> p = make_problem<T>(in);
  Arena arena(nullptr);
  BackwardMemory<T>::take(p, threads, arena);
  return arena.used();
}

}  // namespace

i64 attention_forward_workspace(const AttentionInputs& in, int threads) {
  return with_type(in.q.dtype, [&](auto type) { return measure_forward<decltype(type)>(in, threads); });
}

i64 attention_backward_workspace(const AttentionInputs& in, int threads) {
  return with_type(in.q.dtype, [&](auto type) { return measure_backward<decltype(type)>(in, threads); });
}

void attention_forward(const AttentionInputs& in, const TensorView& out, const TensorView& lse,
                       const TensorView& workspace, int threads) {
  with_type(in.q.dtype, [&](auto type) { forward<decltype(type)>(in, out, lse, workspace.data, threads); });
}

void attention_backward(const AttentionInputs& in, const TensorView& out, const TensorView& lse, const TensorView& dout,
                        const TensorView& dlse, const AttentionGradients& gradients, const TensorView& workspace,
                        int threads) {
  with_type(in.q.dtype,
            [&](auto type) { backward<decltype(type)>(in, out, lse, dout, dlse, gradients, workspace.data, threads); });
}

}  // namespace ofakern::OFAKERN_ISA

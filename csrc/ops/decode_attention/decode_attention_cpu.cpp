// Compiled once per instruction set; see core/isa.h.
#include "ops/decode_attention/decode_attention_project.h"
#include "ops/decode_attention/decode_attention_slots.h"
#include "ops/decode_attention/decode_attention_source.h"

namespace ofakern::OFAKERN_ISA {
namespace {

template <class T, class S>
OFAKERN_LOCAL void run(const DecodeAttentionInputs& in, const TensorView& out, const TensorView& lse, void* workspace,
                       int threads) {
  in.runs.defined() ? attend_source<T, S>(in, out, lse, workspace, threads)
                    : attend_slots<T, S>(in, out, lse, workspace, threads);
}

template <class T, class S>
OFAKERN_LOCAL i64 measure(const DecodeAttentionInputs& in, int threads) {
  Arena arena(nullptr);
  if (in.runs.defined()) {
    SourceMemory<T, S>::take(source_of<S>(in), threads, arena);
  } else {
    const Slots<S> p = slots_of<S>(in);
    SlotMemory::take(p.s, p.key_width, p.columns, threads, arena);
  }
  return arena.used();
}

}  // namespace

void decode_attention_pack(const TensorView& k, const TensorView& v, const TensorView& runs, const TensorView& keys,
                           const TensorView& values, int threads) {
  if (k.dtype == DType::u8) return pack(k, v, runs, keys.as<std::int8_t>(), values.as<std::int8_t>(), threads);
  with_type(k.dtype, [&](auto type) {
    using S = decltype(type);
    pack(k, v, runs, keys.as<S>(), values.as<S>(), threads);
  });
}

i64 decode_attention_project_workspace(const SourceProjection& in, int threads) {
  return with_type(in.states.dtype, [&](auto type) {
    using T = decltype(type);
    return matmul_scratch<Packed<T>, T>(projection_plan<T>(in), threads);
  });
}

void decode_attention_project(const SourceProjection& in, const void* panels, const TensorView& keys,
                              const TensorView& values, void* workspace, int threads) {
  with_type(in.states.dtype, [&](auto type) {
    using T = decltype(type);
    project(in, static_cast<const T*>(panels), keys.as<T>(), values.as<T>(), workspace, threads);
  });
}

i64 decode_attention_workspace(const DecodeAttentionInputs& in, int threads) {
  return with_type(in.q.dtype, [&](auto type) {
    using T = decltype(type);
    return in.keys.dtype == DType::u8 ? measure<T, std::int8_t>(in, threads) : measure<T, T>(in, threads);
  });
}

void decode_attention(const DecodeAttentionInputs& in, const TensorView& out, const TensorView& lse, void* workspace,
                      int threads) {
  with_type(in.q.dtype, [&](auto type) {
    using T = decltype(type);
    in.keys.dtype == DType::u8 ? run<T, std::int8_t>(in, out, lse, workspace, threads)
                               : run<T, T>(in, out, lse, workspace, threads);
  });
}

}  // namespace ofakern::OFAKERN_ISA

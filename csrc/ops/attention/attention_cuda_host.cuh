// What the two sides of attention share on the host: from checked views to what kernels take.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "core/check.h"
#include "ops/attention/attention_cuda_plan.cuh"

namespace ofakern {
namespace {

constexpr Checker kCheck("attention");
constexpr std::int64_t kMaxCudaWidth = 128;
constexpr std::int64_t kMaxCudaHeads = 65535;  // blocks in y

inline std::int64_t queries_of(const AttentionInputs& in) { return in.q.shape[0]; }
inline std::int64_t keys_of(const AttentionInputs& in) { return in.k.shape[0]; }
inline std::int64_t samples_of(const AttentionInputs& in) { return in.layout.k_range.shape[0]; }

inline void check_rows(const char* argument, const TensorView& x) {
  if (!x.defined() || x.numel() == 0) return;
  const bool aligned =
      reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.stride[0] % 8 == 0 && x.stride[1] % 8 == 0;
  kCheck.that(aligned, argument, "have rows that start at multiples of 16 bytes", describe(x));
  kCheck.that(x.shape[2] <= kMaxCudaWidth, argument, "have a width of at most 128 on CUDA", std::to_string(x.shape[2]));
}

// What the CUDA kernels ask for beyond the contract's checks.
inline void check_cuda(const AttentionInputs& in) {
  kCheck.dtype("q", in.q, {DType::bf16, DType::f16});
  kCheck.that(in.q.shape[1] <= kMaxCudaHeads, "H", "be at most 65535 on CUDA", std::to_string(in.q.shape[1]));
  check_rows("q", in.q);
  check_rows("k", in.k);
  check_rows("v", in.v);
  check_rows("q_pos", in.q_pos);
  check_rows("k_pos", in.k_pos);
}

// The work lists that both directions need.
struct PlanScratch {
  KeyTile* tiles;
  unsigned char* order;
  std::int64_t tile_slots;

  void carve(Carver& carver, const AttentionInputs& in) {
    tile_slots = slots_of(keys_of(in), samples_of(in), kStream);
    tiles = carver.take<KeyTile>(tile_slots);
    order = carver.take<unsigned char>(2 * tile_slots * kStream);
  }
};

inline Operand operand_of(const TensorView& x) {
  if (!x.defined()) return {nullptr, 0, 0, 0};
  return {x.data, x.stride[0], x.stride[1], static_cast<int>(x.shape[2])};
}

inline Term term_of(const RelativeTermView& view) {
  // A table without rows is allowed where no pair reads it.
  if (!view.table.defined() || view.table.shape[1] == 0) return {nullptr, nullptr, nullptr, nullptr, 0};
  return {view.table.as<const float>(), view.q_coord.as<const int>(), view.k_coord.as<const int>(),
          view.same.as<const int2>(), static_cast<int>(view.table.shape[1])};
}

inline Call make_call(const AttentionInputs& in, const PlanScratch& plan) {
  Call call{};
  call.q = operand_of(in.q), call.k = operand_of(in.k), call.v = operand_of(in.v);
  call.q_pos = operand_of(in.q_pos), call.k_pos = operand_of(in.k_pos);
  for (int t = 0; t < 2; ++t) call.terms[t] = term_of(in.terms[t]);
  call.head_scale = in.head_scale.as<const float>();
  call.seed = in.dropout_seed.as<const std::int64_t>();
  call.visible = in.layout.visible.as<const int2>();
  call.q_offsets = in.layout.q_offsets.as<const int>(), call.k_offsets = in.layout.k_offsets.as<const int>();
  call.key_seen = in.layout.key_seen.as<const unsigned char>();
  call.k_range = in.layout.k_range.as<const int2>();
  call.key_tiles = plan.tiles, call.order = plan.order, call.order_of_term = plan.tile_slots * kStream;
  call.samples = static_cast<int>(samples_of(in));
  call.heads = static_cast<int>(in.q.shape[1]);
  call.group = static_cast<int>(in.q.shape[1] / in.k.shape[1]);
  call.scale = static_cast<float>(in.scale);
  call.score_scale = static_cast<float>(in.scale * 1.4426950408889634);
  call.dropout = in.dropout_p > 0;
  call.keep_scale = static_cast<float>(1.0 / (1.0 - in.dropout_p));
  call.threshold = static_cast<unsigned>(std::min(std::floor(in.dropout_p * 4294967296.0 + 0.5), 4294967295.0));
  return call;
}

// plans: with its lists of queries and of keys' blocks.
inline void launch_plan(const Call& call, Plans& plans, const PlanScratch& scratch, Stream stream) {
  plans.tiles = scratch.tiles, plans.order = scratch.order, plans.tile_slots = static_cast<int>(scratch.tile_slots);
  const int slots = plans.slots[0] + plans.slots[1] + plans.tile_slots + plans.key_slots;
  if (slots == 0) return;
  simt::launch<attention_plan>(simt::Grid{dim3(static_cast<unsigned>(slots)), dim3(32)}, stream, call, plans);
}

template <class Body>
void with_half_type(DType dtype, const Body& body) {
  if (dtype == DType::bf16)
    body(__nv_bfloat16{});
  else
    body(__half{});
}

}  // namespace
}  // namespace ofakern

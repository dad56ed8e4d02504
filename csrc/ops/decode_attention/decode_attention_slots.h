// Keys found through a table of slots: a task answers one row, all heads, over one chunk of its steps.
//
// A slot holds all heads one after the other, so that a task reads whole slots, from wherever they stand; those to come
// are asked for ahead. Everything is multiplied in f32 straight from storage: with one row per key there is nothing
// that a transposed copy could serve twice.
#pragma once

#include "ops/decode_attention/decode_attention_parts.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr i64 kSlotChunk = 128;  // keys
constexpr i64 kSlotStride = kSlotChunk + 16;
constexpr int kTogether = 4;    // keys at a time
constexpr i64 kSlotsAhead = 8;  // keys

struct SlotScratch {
  float* q;       // [H, padded K]
  float* scores;  // [H, kSlotStride]; then weights
  float* out;     // [H, columns]
  float *tops, *sums;
  Terms terms;

  static SlotScratch take(i64 heads, i64 key_width, i64 columns, Arena& arena) {
    SlotScratch scratch = {};
    scratch.q = arena.take<float>(heads * key_width);
    scratch.scores = arena.take<float>(heads * kSlotStride);
    scratch.out = arena.take<float>(heads * columns);
    scratch.tops = arena.take<float>(heads);
    scratch.sums = arena.take<float>(heads);
    scratch.terms = Terms::take(kSlotChunk, arena);
    return scratch;
  }
};

template <class S>
struct Slots {
  Shapes s;
  const S *keys, *values;
  const float *key_scales, *value_scales;
  const std::int32_t* table;
  i64 table_stride;
  i64 key_width, columns;  // padded to whole vectors
};

// The stored rows of up to kTogether keys; the last one stands in for those beyond the end.
template <class S>
struct Together {
  const S* row[kTogether];

  Together(const S* base, i64 slot_elements, const std::int32_t* table, i64 key, i64 keys) {
    for (int i = 0; i < kTogether; ++i) row[i] = base + table[min_of(key + i, keys - 1)] * slot_elements;
  }
};

template <class S>
OFAKERN_HOT void prefetch_together(const Together<S>& ahead, i64 offset, i64 width) {
  for (int i = 0; i < kTogether; ++i) prefetch_row(ahead.row[i] + offset, width);
}

template <class S>
OFAKERN_HOT void dot_together(const Together<S>& keys, i64 offset, const float* q, i64 width, float* scores) {
  Vec acc[kTogether];
#pragma GCC unroll 4
  for (int i = 0; i < kTogether; ++i) acc[i] = vzero();
  for (i64 x = 0; x < width; x += kWidth) {
    const Vec own = vload(q + x);
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) acc[i] = vfma(own, vload_n(keys.row[i] + offset + x, width - x), acc[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTogether; ++i) scores[i] = hsum(acc[i]);
}

template <class S>
OFAKERN_HOT void add_together(const Together<S>& values, i64 offset, const float* weights, i64 width, float* out) {
  for (i64 x = 0; x < width; x += kWidth) {
    Vec acc = vload(out + x);
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i)
      acc = vfma(vset(weights[i]), vload_n(values.row[i] + offset + x, width - x), acc);
    vstore(out + x, acc);
  }
}

// Scores beyond the last key repeat its score or are 0: Terms masks them.
template <class S>
OFAKERN_LOCAL void score_slots(const Slots<S>& p, const SlotScratch& scratch, const std::int32_t* table, i64 keys) {
  const i64 width = p.s.key_width, slot = p.s.heads * width;
  for (i64 j = 0; j < keys; j += kTogether) {
    const Together<S> now(p.keys, slot, table, j, keys), ahead(p.keys, slot, table, j + kSlotsAhead, keys);
    for (i64 h = 0; h < p.s.heads; ++h) {
      prefetch_together(ahead, h * width, width);
      float* scores = scratch.scores + h * kSlotStride + j;
      dot_together(now, h * width, scratch.q + h * p.key_width, width, scores);
      if (p.key_scales == nullptr) continue;
      for (i64 i = 0; i < min_of<i64>(kTogether, keys - j); ++i)
        scores[i] *= p.key_scales[table[j + i] * p.s.heads + h];
    }
  }
}

template <class S>
OFAKERN_LOCAL void add_slots(const Slots<S>& p, const SlotScratch& scratch, const std::int32_t* table, i64 keys) {
  const i64 width = p.s.value_width, slot = p.s.heads * width;
  zero_row(scratch.out, p.s.heads * p.columns);
  for (i64 j = 0; j < keys; j += kTogether) {
    const Together<S> now(p.values, slot, table, j, keys), ahead(p.values, slot, table, j + kSlotsAhead, keys);
    for (i64 h = 0; h < p.s.heads; ++h) {
      prefetch_together(ahead, h * width, width);
      float weights[kTogether];
      for (i64 i = 0; i < kTogether; ++i) {
        weights[i] = scratch.scores[h * kSlotStride + j + i];  // 0 beyond the last key
        if (p.value_scales != nullptr && j + i < keys) weights[i] *= p.value_scales[table[j + i] * p.s.heads + h];
      }
      add_together(now, h * width, weights, width, scratch.out + h * p.columns);
    }
  }
}

template <class T, class S>
OFAKERN_LOCAL void slots_task(const Slots<S>& p, const CallPlan& plan, const SlotScratch& scratch, i64 task, const T* q,
                              T* out, float* lse) {
  const i64 b = plan.sample_of(task, p.s.samples);
  const SamplePlan& sample = plan.samples[b];
  const i64 own = (task - sample.first_task) / sample.chunks, index = (task - sample.first_task) % sample.chunks;
  const i64 row = p.s.row_offsets[b] + own, key = index * kSlotChunk;
  const i64 keys = min_of(kSlotChunk, p.s.count(b) - key), padded = round_up(keys, kWidth);
  const std::int32_t* table = p.table + row * p.table_stride + key;
  for (i64 h = 0; h < p.s.heads; ++h)
    copy_row(q + (row * p.s.heads + h) * p.s.key_width, p.s.key_width, scratch.q + h * p.key_width, p.key_width);
  score_slots(p, scratch, table, keys);
  for (i64 h = 0; h < p.s.heads; ++h) {
    const float* bias = p.s.bias == nullptr ? nullptr : p.s.bias + h * p.s.bias_stride + sample.first_bias + key;
    float* row = scratch.scores + h * kSlotStride;
    for (i64 j = round_up(keys, kTogether); j < padded; ++j) row[j] = 0.0f;
    if (h == 0 || bias != nullptr) scratch.terms.fill(p.s, keys, padded, bias, nullptr);
    scratch.tops[h] = score_row(scratch.terms, row, padded, [](i64) {});
    scratch.sums[h] = weigh_row(row, padded, scratch.tops[h], nullptr, row, [](i64) {});
  }
  add_slots(p, scratch, table, keys);
  for (i64 h = 0; h < p.s.heads; ++h) {
    float* values = scratch.out + h * p.columns;
    if (sample.apart == 1) {
      finish(p.s, {values, scratch.tops + h, scratch.sums + h}, 1, p.columns, row, h, out, lse);
      continue;
    }
    const Part part = sample.parts.at(own, h, index);
    *part.top = scratch.tops[h];
    *part.sum = scratch.sums[h];
    std::memcpy(part.values, values, static_cast<std::size_t>(p.columns) * sizeof(float));
  }
}

template <class S>
OFAKERN_LOCAL Slots<S> slots_of(const DecodeAttentionInputs& in) {
  return {shapes_of(in),
          in.keys.as<const S>(),
          in.values.as<const S>(),
          in.key_scales.as<const float>(),
          in.value_scales.as<const float>(),
          in.slots.as<const std::int32_t>(),
          in.slots.stride[0],
          round_up(in.q.shape[2], kWidth),
          round_up(in.value_width, kWidth)};
}

struct SlotMemory {
  CallPlan plan;
  char* threads;
  i64 bytes_per_thread;

  static SlotMemory take(const Shapes& s, i64 key_width, i64 columns, int threads, Arena& arena) {
    SlotMemory memory = {};
    memory.plan = CallPlan::take(s, kSlotChunk, false, false, columns, arena);
    Arena one(nullptr);
    SlotScratch::take(s.heads, key_width, columns, one);
    memory.bytes_per_thread = round_up(one.used(), 4096) + 64;
    memory.threads = arena.take<char>(memory.bytes_per_thread * threads);
    return memory;
  }
};

template <class T, class S>
OFAKERN_LOCAL void attend_slots(const DecodeAttentionInputs& in, const TensorView& out, const TensorView& lse,
                                void* workspace, int threads) {
  const Slots<S> p = slots_of<S>(in);
  Arena arena(workspace);
  const SlotMemory memory = SlotMemory::take(p.s, p.key_width, p.columns, threads, arena);
  parallel_for(memory.plan.tasks, threads, [&](i64 task, int thread) {
    Arena own(memory.threads + memory.bytes_per_thread * thread);
    const SlotScratch scratch = SlotScratch::take(p.s.heads, p.key_width, p.columns, own);
    slots_task<T, S>(p, memory.plan, scratch, task, in.q.as<const T>(), out.as<T>(), lse.as<float>());
  });
  finish_all(p.s, memory.plan, threads, out.as<T>(), lse.as<float>());
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

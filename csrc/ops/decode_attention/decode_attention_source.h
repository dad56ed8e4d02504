// Keys stored once per sample: a task streams one chunk of one head's keys, then its values, for all rows of the
// sample.
#pragma once

#include "ops/decode_attention/decode_attention_parts.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr i64 kSourceChunk = 512;                // keys
constexpr i64 kScoreStride = kSourceChunk + 16;  // rows of scores must not meet in the same cache sets
constexpr i64 kValueStep = 128;  // keys whose values all tiles of rows use while they are in the L1 cache

// T: of q and out; S: as stored.
template <class T, class S>
struct SourceScratch {
  using A = typename OperandA<S>::type;
  A* q;           // [kRowGroup, padded K]
  float* scores;  // [kRowGroup, kScoreStride]; then weights
  A* weights;     // the same, where A is bf16
  float* out;     // [kRowGroup, columns]
  float *tops, *sums;

  static SourceScratch take(i64 key_width, i64 columns, Arena& arena) {
    SourceScratch scratch = {};
    scratch.q = arena.take<A>(kRowGroup * key_width);
    scratch.scores = arena.take<float>(kRowGroup * kScoreStride);
    scratch.weights = arena.take<A>(sizeof(A) == 4 ? 0 : kRowGroup * kScoreStride);
    scratch.out = arena.take<float>(kRowGroup * columns);
    scratch.tops = arena.take<float>(kRowGroup);
    scratch.sums = arena.take<float>(kRowGroup);
    return scratch;
  }
};

// One head's chunk of one sample as stored.
template <class S>
struct Chunk {
  const S *keys, *values;
  const float *key_scales, *value_scales, *bias;  // of the chunk's first key, or null
  i64 count, padded;                              // keys
  i64 panel;                                      // elements from one panel of values to the next
};

template <class S>
struct Source {
  Shapes s;
  const S *keys, *values;
  const float *key_scales, *value_scales;
  const std::int32_t* runs;
  i64 key_width, columns;  // as stored

  Chunk<S> chunk(const CallPlan& plan, i64 b, i64 head, i64 index) const {
    const i64 first = runs[2 * b], count = s.count(b), padded = round_up(count, kBlock);
    const i64 key = index * kSourceChunk, base = first * s.heads + head * padded;  // padded keys before this head's
    Chunk<S> c;
    c.keys = keys + (base + key) * key_width;
    c.values = values + base * columns + key * kBlock;
    c.key_scales = key_scales == nullptr ? nullptr : key_scales + base + key;
    c.value_scales = value_scales == nullptr ? nullptr : value_scales + base + key;
    c.bias = s.bias == nullptr ? nullptr : s.bias + head * s.bias_stride + plan.samples[b].first_bias + key;
    c.count = min_of(kSourceChunk, count - key);
    c.padded = round_up(c.count, kBlock);
    c.panel = padded * kBlock;
    return c;
  }
};

OFAKERN_HOT void scale_weights(float* row, const float* scales, i64 padded) {
  for (i64 x = 0; x < padded; x += kWidth) vstore(row + x, vmul(vload(row + x), vload(scales + x)));
}
OFAKERN_HOT const float* narrow(const float* row, const float*, i64) { return row; }
OFAKERN_HOT const bf16* narrow(const float* row, bf16* to, i64 padded) {
  for (i64 x = 0; x < padded; x += kWidth) vstore_as(to + x, vload(row + x));
  return to;
}

// Dot products of all rows with a chunk's keys: its two halves are read side by side.
template <class S, class A>
OFAKERN_LOCAL void score_chunk(const Source<S>& p, const Chunk<S>& c, const A* q, i64 rows, float* scores) {
  const i64 width = p.key_width, half = c.padded / kBlock / 2 * kBlock;
  const auto block = [&](i64 key) { return c.keys + key * width; };
  for (i64 key = 0; key < half; key += kBlock)
    stream<2>(rows, width, q, width, Streams<S>{{block(key), block(half + key)}, {scores + key, scores + half + key}},
              kScoreStride, false);
  if (2 * half < c.padded)
    stream<1>(rows, width, q, width, Streams<S>{{block(2 * half)}, {scores + 2 * half}}, kScoreStride, false);
}

// Weighted sums of a chunk's values, panel by panel or two at a time.
template <class S, class A>
OFAKERN_LOCAL void add_chunk(const Source<S>& p, const Chunk<S>& c, const A* weights, i64 rows, float* out) {
  i64 x = 0;
  for (; x + 2 * kBlock <= p.columns; x += 2 * kBlock)
    for (i64 key = 0; key < c.padded; key += kValueStep) {
      const S* values = c.values + x / kBlock * c.panel + key * kBlock;
      stream<2>(rows, min_of(kValueStep, c.padded - key), weights + key, kScoreStride,
                Streams<S>{{values, values + c.panel}, {out + x, out + x + kBlock}}, p.columns, key > 0);
    }
  for (i64 key = 0; x < p.columns && key < c.padded; key += kValueStep)
    stream<1>(rows, min_of(kValueStep, c.padded - key), weights + key, kScoreStride,
              Streams<S>{{c.values + x / kBlock * c.panel + key * kBlock}, {out + x}}, p.columns, key > 0);
}

// Scores of a chunk, their weights, the weighted values: in scratch.out, tops and sums.
template <class T, class S>
OFAKERN_LOCAL void attend(const Source<S>& p, const SourceScratch<T, S>& scratch, const Chunk<S>& c, i64 rows) {
  using A = typename SourceScratch<T, S>::A;
  const StreamTiles tiles(rows);
  score_chunk(p, c, scratch.q, rows, scratch.scores);
  // Softmax reads no memory: the values begin to arrive meanwhile, a line of each of two panels per vector.
  const char* values = reinterpret_cast<const char*>(c.values);
  const i64 second = p.columns > kBlock ? c.panel * static_cast<i64>(sizeof(S)) : 0;
  const A* weights = nullptr;
  for (i64 r = 0; r < rows; ++r, values += c.padded / kWidth * 64) {
    float* row = scratch.scores + r * kScoreStride;
    soften(p.s, row, c.count, c.padded, c.bias, c.key_scales, scratch.tops + r, scratch.sums + r,
           [=](i64 x, bool again) { __builtin_prefetch(values + x / kWidth * 64 + (again ? second : 0), 0, 2); });
    if (c.value_scales != nullptr) scale_weights(row, c.value_scales, c.padded);
    const A* narrowed = narrow(row, scratch.weights + r * kScoreStride, c.padded);
    weights = r == 0 ? narrowed : weights;
  }
  add_chunk(p, c, weights, rows, scratch.out);
}

template <class T, class S>
OFAKERN_LOCAL void source_task(const Source<S>& p, const CallPlan& plan, const SourceScratch<T, S>& scratch, i64 task,
                               const T* q, T* out, float* lse) {
  const i64 b = plan.sample_of(task, p.s.samples);
  const SamplePlan& sample = plan.samples[b];
  const i64 head = (task - sample.first_task) / sample.chunks, index = (task - sample.first_task) % sample.chunks;
  const Chunk<S> c = p.chunk(plan, b, head, index);
  const i64 all = p.s.rows_of(b);
  for (i64 first = 0; first < all; first += kRowGroup) {
    const i64 rows = min_of(kRowGroup, all - first), row = p.s.row_offsets[b] + first;
    for (i64 r = 0; r < rows; ++r)
      copy_row(q + ((row + r) * p.s.heads + head) * p.s.key_width, p.s.key_width, scratch.q + r * p.key_width,
               p.key_width);
    attend<T, S>(p, scratch, c, rows);
    for (i64 r = 0; r < rows; ++r) {
      float* values = scratch.out + r * p.columns;
      if (sample.chunks == 1) {
        finish(p.s, {values, scratch.tops + r, scratch.sums + r}, 1, p.columns, row + r, head, out, lse);
        continue;
      }
      const Part part = sample.parts.at(first + r, head, index);
      *part.top = scratch.tops[r];
      *part.sum = scratch.sums[r];
      std::memcpy(part.values, values, static_cast<std::size_t>(p.columns) * sizeof(float));
    }
  }
}

template <class S>
OFAKERN_LOCAL Source<S> source_of(const DecodeAttentionInputs& in) {
  return {shapes_of(in),
          in.keys.as<const S>(),
          in.values.as<const S>(),
          in.key_scales.as<const float>(),
          in.value_scales.as<const float>(),
          in.runs.as<const std::int32_t>(),
          packed_key_width(in.q.shape[2], in.keys.dtype),
          packed_value_width(in.value_width)};
}

template <class T, class S>
struct SourceMemory {
  CallPlan plan;
  char* threads;
  i64 bytes_per_thread;

  static SourceMemory take(const Source<S>& p, int threads, Arena& arena) {
    SourceMemory memory = {};
    memory.plan = CallPlan::take(p.s, kSourceChunk, true, p.columns, arena);
    Arena one(nullptr);
    SourceScratch<T, S>::take(p.key_width, p.columns, one);
    memory.bytes_per_thread = round_up(one.used(), 4096) + 64;  // + 64: threads must not meet in the same cache sets
    memory.threads = arena.take<char>(memory.bytes_per_thread * threads);
    return memory;
  }
};

template <class T, class S>
OFAKERN_LOCAL void attend_source(const DecodeAttentionInputs& in, const TensorView& out, const TensorView& lse,
                                 void* workspace, int threads) {
  const Source<S> p = source_of<S>(in);
  Arena arena(workspace);
  const SourceMemory<T, S> memory = SourceMemory<T, S>::take(p, threads, arena);
  parallel_for(memory.plan.tasks, threads, [&](i64 task, int thread) {
    Arena own(memory.threads + memory.bytes_per_thread * thread);
    const SourceScratch<T, S> scratch = SourceScratch<T, S>::take(p.key_width, p.columns, own);
    source_task<T, S>(p, memory.plan, scratch, task, in.q.as<const T>(), out.as<T>(), lse.as<float>());
  });
  finish_all(p.s, memory.plan, threads, out.as<T>(), lse.as<float>());
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

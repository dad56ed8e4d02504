// Keys stored once per sample: a task streams one chunk of one head's keys, then its values, for all rows of the
// sample.
#pragma once

#include "ops/decode_attention/decode_attention_parts.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr i64 kSourceChunk = 512;                // keys
constexpr i64 kNextKeys = 2048;                  // bytes of the chunk to come
constexpr i64 kScoreStride = kSourceChunk + 16;  // rows of scores must not meet in the same cache sets

// T: of q and out; S: as stored.
template <class T, class S>
struct SourceScratch {
  using A = typename OperandA<S>::type;
  A* q;           // [kRowGroup, padded K]
  float* scores;  // [kRowGroup, kScoreStride]; then weights
  A* weights;     // the same; scores themselves where A is float
  Terms terms;
  PartRoom parts;  // of one head, where tasks see all of its chunks

  static SourceScratch take(i64 key_width, i64 columns, i64 rows, i64 chunks, Arena& arena) {
    SourceScratch scratch = {};
    scratch.q = arena.take<A>(kRowGroup * key_width);
    scratch.scores = arena.take<float>(kRowGroup * kScoreStride);
    if constexpr (sizeof(A) == 4)
      scratch.weights = scratch.scores;
    else
      scratch.weights = arena.take<A>(kRowGroup * kScoreStride);
    scratch.terms = Terms::take(kSourceChunk, arena);
    scratch.parts = PartRoom::take(rows, 1, chunks, columns, arena);
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
OFAKERN_LOCAL void add_chunk(const Source<S>& p, const Chunk<S>& c, const A* weights, i64 rows, float* out, i64 ldo) {
  i64 x = 0;
  for (; x + 2 * kBlock <= p.columns; x += 2 * kBlock)
    for (i64 key = 0; key < c.padded; key += kValueStep<A>) {
      const S* values = c.values + x / kBlock * c.panel + key * kBlock;
      stream<2>(rows, min_of(kValueStep<A>, c.padded - key), weights + key, kScoreStride,
                Streams<S>{{values, values + c.panel}, {out + x, out + x + kBlock}}, ldo, key > 0);
    }
  for (i64 key = 0; x < p.columns && key < c.padded; key += kValueStep<A>)
    stream<1>(rows, min_of(kValueStep<A>, c.padded - key), weights + key, kScoreStride,
              Streams<S>{{c.values + x / kBlock * c.panel + key * kBlock}, {out + x}}, ldo, key > 0);
}

// Scores of a chunk, their weights, the weighted values: to the parts of `rows` rows, `stride` parts from row to row.
template <class T, class S>
OFAKERN_LOCAL void attend(const Source<S>& p, const SourceScratch<T, S>& scratch, const Chunk<S>& c, i64 rows,
                          const Part& to, i64 stride) {
  score_chunk(p, c, scratch.q, rows, scratch.scores);
  // Softmax reads no memory: the values begin to arrive meanwhile, first of one panel, then of its neighbour.
  const i64 row_bytes = c.padded / kWidth * 64, second = p.columns > kBlock ? c.panel * static_cast<i64>(sizeof(S)) : 0;
  const char* values = reinterpret_cast<const char*>(c.values);
  for (i64 r = 0; r < rows; ++r)
    to.top[r * stride] = score_row(scratch.terms, scratch.scores + r * kScoreStride, c.padded,
                                   [=](i64 x) { ask_near(values + r * row_bytes + x / kWidth * 64); });
  for (i64 r = 0; r < rows; ++r)
    to.sum[r * stride] = weigh_row(scratch.scores + r * kScoreStride, c.padded, to.top[r * stride], c.value_scales,
                                   scratch.weights + r * kScoreStride,
                                   [=](i64 x) { ask_near(values + second + r * row_bytes + x / kWidth * 64); });
  add_chunk(p, c, scratch.weights, rows, to.values, stride * p.columns);
  // The keys that follow begin to arrive while the last products end: this head's, or (mostly) the next task's.
  const char* next = reinterpret_cast<const char*>(c.keys + c.padded * p.key_width);
  for (i64 byte = 0; byte < kNextKeys; byte += 64) ask_near(next + byte);
}

// One chunk of a head for all rows of the sample.
template <class T, class S>
OFAKERN_LOCAL void attend_chunk(const Source<S>& p, const CallPlan& plan, const SourceScratch<T, S>& scratch,
                                StreamTiles& tiles, i64 b, i64 head, i64 index, const T* q) {
  const SamplePlan& sample = plan.samples[b];
  const Chunk<S> c = p.chunk(plan, b, head, index);
  const PartRoom& room = sample.apart == 1 ? scratch.parts : sample.parts;
  scratch.terms.fill(p.s, c.count, c.padded, c.bias, c.key_scales);
  for (i64 first = 0; first < p.s.rows_of(b); first += kRowGroup) {
    const i64 rows = min_of(kRowGroup, p.s.rows_of(b) - first), row = p.s.row_offsets[b] + first;
    for (i64 r = 0; r < rows; ++r)
      copy_row(q + ((row + r) * p.s.heads + head) * p.s.key_width, p.s.key_width, scratch.q + r * p.key_width,
               p.key_width);
    tiles.use(rows);
    attend<T, S>(p, scratch, c, rows, room.at(first, sample.apart == 1 ? 0 : head, index), room.row_stride());
  }
}

template <class T, class S>
OFAKERN_LOCAL void source_task(const Source<S>& p, const CallPlan& plan, const SourceScratch<T, S>& scratch, i64 task,
                               const T* q, T* out, float* lse) {
  const i64 b = plan.sample_of(task, p.s.samples);
  const SamplePlan& sample = plan.samples[b];
  const i64 head = (task - sample.first_task) / sample.apart, index = (task - sample.first_task) % sample.apart;
  StreamTiles tiles;
  if (sample.apart > 1) return attend_chunk(p, plan, scratch, tiles, b, head, index, q);
  for (i64 i = 0; i < sample.chunks; ++i) attend_chunk(p, plan, scratch, tiles, b, head, i, q);
  for (i64 r = 0; r < p.s.rows_of(b); ++r)
    finish(p.s, scratch.parts.at(r, 0, 0), sample.chunks, p.columns, p.s.row_offsets[b] + r, head, out, lse);
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

// A head's chunks are one task where there are heads enough for all threads: parts stay in the nearest cache, and one
// pass does it all. Chunks are cut and added in the same way, so that bits do not depend on it.
OFAKERN_LOCAL bool whole_heads(const Shapes& s, int threads) { return s.samples * s.heads >= 4 * threads; }

template <class T, class S>
struct SourceMemory {
  CallPlan plan;
  char* threads;
  i64 bytes_per_thread, rows, chunks;  // of the parts that a task may hold

  static SourceMemory take(const Source<S>& p, int threads, Arena& arena) {
    SourceMemory memory = {};
    memory.plan = CallPlan::take(p.s, kSourceChunk, true, whole_heads(p.s, threads), p.columns, arena);
    for (i64 b = 0; b < p.s.samples; ++b) {
      memory.rows = max_of(memory.rows, p.s.rows_of(b));
      memory.chunks = max_of(memory.chunks, ceil_div(p.s.count(b), kSourceChunk));
    }
    memory.chunks = whole_heads(p.s, threads) ? max_of<i64>(1, memory.chunks) : 1;
    Arena one(nullptr);
    memory.scratch(p, one);
    memory.bytes_per_thread = round_up(one.used(), 4096) + 64;  // + 64: threads must not meet in the same cache sets
    memory.threads = arena.take<char>(memory.bytes_per_thread * threads);
    return memory;
  }
  SourceScratch<T, S> scratch(const Source<S>& p, Arena& arena) const {
    return SourceScratch<T, S>::take(p.key_width, p.columns, rows, chunks, arena);
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
    const SourceScratch<T, S> scratch = memory.scratch(p, own);
    source_task<T, S>(p, memory.plan, scratch, task, in.q.as<const T>(), out.as<T>(), lse.as<float>());
  });
  finish_all(p.s, memory.plan, threads, out.as<T>(), lse.as<float>());
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

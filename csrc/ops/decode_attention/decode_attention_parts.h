// What both kinds of cache share: softmax over one chunk of keys, and the merge of chunks.
//
// Keys are cut into chunks (a fixed number of keys, so the cut depends on shapes only). A task makes one chunk's part
// of a row's result: values weighted by 2^(score - top), the sum of the weights and top, the chunk's largest score in
// units of log2(e). A second pass adds the parts of each row in the order of the chunks.
#pragma once

#include "core/arena.h"
#include "core/parallel.h"
#include "core/with_type.h"
#include "ops/decode_attention/decode_attention_tiles.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

struct Shapes {
  i64 samples, rows, heads, key_width, value_width;
  const std::int32_t* row_offsets;
  const std::int32_t* counts;  // element b * count_stride
  i64 count_stride;
  const float* bias;
  i64 bias_stride;
  const float* head_scale;
  float scale;

  i64 count(i64 b) const { return counts[b * count_stride]; }
  i64 rows_of(i64 b) const { return row_offsets[b + 1] - row_offsets[b]; }
};

OFAKERN_LOCAL Shapes shapes_of(const DecodeAttentionInputs& in) {
  const bool source = in.runs.defined();
  return {in.row_offsets.shape[0] - 1,
          in.q.shape[0],
          in.q.shape[1],
          in.q.shape[2],
          in.value_width,
          in.row_offsets.as<const std::int32_t>(),
          source ? in.runs.as<const std::int32_t>() + 1 : in.counts.as<const std::int32_t>(),
          source ? 2 : 1,
          in.bias.as<const float>(),
          in.bias.defined() ? in.bias.stride[0] : 0,
          in.head_scale.as<const float>(),
          static_cast<float>(in.scale)};
}

// A chunk's part of one row and head, and where it stands. Parts of a row and head are `columns` floats apart.
struct Part {
  float* values;
  float* top;
  float* sum;
};

// Room for parts: [row][head][chunk]. Nothing where a task finishes its rows itself.
struct PartRoom {
  float* values;
  float *tops, *sums;
  i64 chunks, heads, columns;

  static PartRoom take(i64 rows, i64 heads, i64 chunks, i64 columns, Arena& arena) {
    const i64 parts = rows * heads * chunks;
    if (parts == 0) return {};
    float* values = arena.take<float>(parts * columns);
    float* tops = arena.take<float>(parts);
    return {values, tops, arena.take<float>(parts), chunks, heads, columns};
  }
  Part at(i64 row, i64 head, i64 chunk) const {
    const i64 index = row * row_stride() + head * chunks + chunk;
    return {values + index * columns, tops + index, sums + index};
  }
  i64 row_stride() const { return heads * chunks; }  // parts
};

// The plan of a call: what stands where for each sample. Filled from shapes only.
struct SamplePlan {
  i64 first_task, chunks, apart, first_bias;
  PartRoom parts;
};

// A task of slots is one row and chunk, all heads; one of a source is a head and a chunk of a sample, or all of the
// head's chunks. A sample whose tasks see all chunks needs no room for parts: they finish their rows themselves.
struct CallPlan {
  SamplePlan* samples;
  i64 tasks;

  static CallPlan take(const Shapes& s, i64 chunk_keys, bool source, bool whole, i64 columns, Arena& arena) {
    CallPlan plan = {arena.take<SamplePlan>(s.samples + 1), 0};
    i64 bias = 0;
    for (i64 b = 0; b < s.samples; ++b) {
      const i64 chunks = max_of<i64>(1, ceil_div(s.count(b), chunk_keys)), rows = s.rows_of(b);
      const i64 apart = whole ? 1 : chunks;  // tasks of a head or row
      const PartRoom parts = PartRoom::take(apart == 1 ? 0 : rows, s.heads, chunks, columns, arena);
      if (plan.samples != nullptr) plan.samples[b] = {plan.tasks, chunks, apart, bias, parts};
      plan.tasks += (source ? (rows > 0 ? s.heads : 0) : rows) * apart;
      bias += s.count(b);
    }
    return plan;
  }

  // The sample whose tasks `task` is among.
  i64 sample_of(i64 task, i64 count) const {
    i64 lo = 0, hi = count;
    while (hi - lo > 1) {
      const i64 middle = (lo + hi) / 2;
      (samples[middle].first_task <= task ? lo : hi) = middle;
    }
    return lo;
  }
};

// What makes scores, in units of log2(e), of a chunk's dot products: dot * factor + addend, which is -inf past the last
// key. Written once per chunk and head, so that the rows' loops ask nothing.
struct Terms {
  float *factors, *addends;

  static Terms take(i64 keys, Arena& arena) { return {arena.take<float>(keys), arena.take<float>(keys)}; }

  // bias, key_scales: of the chunk's first key, or null. padded: a multiple of kWidth.
  void fill(const Shapes& s, i64 keys, i64 padded, const float* bias, const float* key_scales) const {
    const Vec factor = vset(s.scale * kLog2e), unit = vset(kLog2e);
    for (i64 x = 0; x < padded; x += kWidth) {
      const i64 left = max_of<i64>(keys - x, 0);
      vstore(factors + x, key_scales == nullptr ? factor : vmul(factor, vload_n(key_scales + x, left)));
      const Vec addend = bias == nullptr ? vzero() : vmul(unit, vload_n(bias + x, left));
      const bool whole = left >= kWidth;
      vstore(addends + x, whole ? addend : vselect(mask_first(static_cast<int>(left)), addend, vset(-kInfinity)));
    }
  }
};

// Dot products of one row become scores, in place; returns their maximum. meanwhile(x) is called for every vector.
template <class Meanwhile>
OFAKERN_LOCAL float score_row(const Terms& terms, float* row, i64 padded, const Meanwhile& meanwhile) {
  Vec most = vset(-kInfinity);
  for (i64 x = 0; x < padded; x += kWidth) {
    const Vec y = vfma(vload(row + x), vload(terms.factors + x), vload(terms.addends + x));
    meanwhile(x);
    vstore(row + x, y);
    most = vmax(y, most);
  }
  return hmax(most);
}

// Scores of one row become weights 2^(score - top), 0 for pads; returns their sum. scales: what weights are multiplied
// by after that, or null. A chunk whose scores are all -inf (top -inf) has weights and sum 0.
template <class W, class Meanwhile>
OFAKERN_LOCAL float weigh_row(const float* row, i64 padded, float top, const float* scales, W* weights,
                              const Meanwhile& meanwhile) {
  const Vec reference = vset(top == -kInfinity ? 0.0f : top);
  Vec total = vzero();
  for (i64 x = 0; x < padded; x += kWidth) {
    const Vec weight = vexp2_for(vsub(vload(row + x), reference), weights);
    meanwhile(x);
    total = vadd(total, weight);
    vstore_as(weights + x, scales == nullptr ? weight : vmul(weight, vload(scales + x)));
  }
  return hsum(total);
}

// One row and head from its parts, which stand one after the other.
template <class T>
OFAKERN_LOCAL void finish(const Shapes& s, Part part, i64 chunks, i64 columns, i64 row, i64 head, T* out, float* lse) {
  float top = -kInfinity;
  for (i64 c = 0; c < chunks; ++c) top = max_of(top, part.top[c]);
  const float reference = top == -kInfinity ? 0.0f : top;
  float sum = 0.0f;
  for (i64 c = 0; c < chunks; ++c) {
    const Vec factor = vexp2(vset(part.top[c] - reference));
    alignas(64) float lanes[kWidth];
    vstore(lanes, factor);
    sum += part.sum[c] * lanes[0];
    float* values = part.values + c * columns;
    if (c == 0 && chunks == 1) break;
    for (i64 x = 0; x < s.value_width; x += kWidth) {
      const Vec weighted = vmul(vload(values + x), factor);
      vstore(part.values + x, c == 0 ? weighted : vadd(vload(part.values + x), weighted));
    }
  }
  const bool empty = sum == 0.0f;
  const float head_scale = s.head_scale == nullptr ? 1.0f : s.head_scale[head];
  const Vec factor = vset(empty ? 0.0f : head_scale / sum);
  T* to = out + (row * s.heads + head) * s.value_width;
  for (i64 x = 0; x < s.value_width; x += kWidth)
    vstore_n(to + x, empty ? vzero() : vmul(vload(part.values + x), factor), s.value_width - x);
  lse[row * s.heads + head] = empty ? -kInfinity : reference * kLn2 + __builtin_logf(sum);
}

// The second pass: rows of samples whose chunks were tasks apart.
template <class T>
OFAKERN_LOCAL void finish_all(const Shapes& s, const CallPlan& plan, int threads, T* out, float* lse) {
  bool any = false;
  for (i64 b = 0; b < s.samples; ++b) any = any || plan.samples[b].apart > 1;
  if (!any) return;
  parallel_for(s.samples * s.heads, threads, [&](i64 task, int) {
    const i64 b = task / s.heads, head = task % s.heads;
    const SamplePlan& sample = plan.samples[b];
    if (sample.apart == 1) return;
    for (i64 r = 0; r < s.rows_of(b); ++r)
      finish(s, sample.parts.at(r, head, 0), sample.chunks, sample.parts.columns, s.row_offsets[b] + r, head, out, lse);
  });
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

// The forward pass over one chunk: scores block by block, online log-sum-exp, losses.
#pragma once

#include "ops/cross_entropy/cross_entropy_chunk.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr int kSide = 2;  // vectors of tokens that go down the rows together; kTokenMultiple >= 2 * kWidth

// Where a block and kSide vectors of tokens stand in the chunk's arrays.
template <class T>
struct Corner {
  const float* scores;        // of the first row; rows are kGroup apart
  const std::uint64_t* bits;  // of the first row, or null
  i64 token;                  // inside the group
  i64 rows;
  Stored<T>* stored;  // like scores, or null

  Mask mask(i64 r, int x) const { return word_mask(bits[r], token + x * kWidth); }
};

template <class T, bool MASKED>
OFAKERN_HOT void column_maxima(const Corner<T>& at, Vec top[kSide]) {
  for (int x = 0; x < kSide; ++x) top[x] = vset(-kInfinity);
  for (i64 r = 0; r < at.rows; ++r)
#pragma GCC unroll 2
    for (int x = 0; x < kSide; ++x) {
      const Vec score = vload(at.scores + r * kGroup + x * kWidth);
      top[x] = vmax(top[x], MASKED ? vselect(at.mask(r, x), score, vset(-kInfinity)) : score);
    }
}

// sum of exp(score - base), sum of (score - base), and how many; stores the exponentials where they are kept.
template <class T, bool MASKED, bool STORES>
OFAKERN_HOT void column_sums(const Corner<T>& at, const Vec base[kSide], Vec sum[kSide], Vec gap[kSide],
                             Vec count[kSide]) {
  for (int x = 0; x < kSide; ++x) sum[x] = gap[x] = count[x] = vzero();
  for (i64 r = 0; r < at.rows; ++r)
#pragma GCC unroll 2
    for (int x = 0; x < kSide; ++x) {
      Vec over = vsub(vload(at.scores + r * kGroup + x * kWidth), base[x]);
      Vec e = vexp2(vmul(over, vset(kLog2e)));
      if (MASKED) {
        const Mask mask = at.mask(r, x);
        e = vselect(mask, e, vzero());
        over = vselect(mask, over, vzero());
        count[x] = vadd(count[x], vselect(mask, vset(1.0f), vzero()));
      }
      sum[x] = vadd(sum[x], e);
      gap[x] = vadd(gap[x], over);
      if (STORES) vstore_as(at.stored + r * kGroup + x * kWidth, e);
    }
}

template <class T, bool MASKED, bool STORES>
OFAKERN_LOCAL void reduce_columns(const Chunk<T>& c, const Corner<T>& at, i64 index) {
  Vec top[kSide], base[kSide], sum[kSide], gap[kSide], count[kSide];
  column_maxima<T, MASKED>(at, top);
  // A block with nothing allowed has the maximum -inf; its exponentials are masked.
  for (int x = 0; x < kSide; ++x) base[x] = MASKED ? vmax(top[x], vset(-__FLT_MAX__)) : top[x];
  column_sums<T, MASKED, STORES>(at, base, sum, gap, count);
  for (int x = 0; x < kSide; ++x) {
    vstore(c.block_max + index + x * kWidth, top[x]);
    vstore(c.block_sum + index + x * kWidth, sum[x]);
    vstore(c.block_gap + index + x * kWidth, gap[x]);
    if (MASKED) vstore(c.block_count + index + x * kWidth, count[x]);
  }
}

// The first allowed row that has the block's maximum, for every token of the group.
template <class T>
OFAKERN_LOCAL void find_best(const Problem<T>& p, const Chunk<T>& c, const float* scores, i64 block, i64 group) {
  const std::uint64_t* bits = c.bits == nullptr ? nullptr : c.bits + group * p.vocabulary + block * kBlock;
  for (i64 t = 0; t < c.group_tokens(group); ++t) {
    const i64 index = block * c.capacity + group * kGroup + t;
    std::int32_t best = -1;
    for (i64 r = 0; r < p.block_rows(block) && best < 0; ++r)
      if (scores[r * kGroup + t] == c.block_max[index] && (bits == nullptr || (bits[r] >> t & 1u) != 0))
        best = static_cast<std::int32_t>(r);
    c.block_best[index] = best;
  }
}

template <class T>
OFAKERN_LOCAL void take_label_scores(const Problem<T>& p, Chunk<T>& c, const float* scores, i64 block, i64 group) {
  for (i64 t = 0; t < c.group_tokens(group); ++t) {
    const i64 token = group * kGroup + t, label = p.labels[c.row(token)];
    if (label / kBlock != block) continue;
    const bool allowed = c.bits == nullptr || (c.bits[group * p.vocabulary + label] >> t & 1u) != 0;
    c.label_score[token] = allowed ? scores[label % kBlock * kGroup + t] : -kInfinity;
  }
}

template <class T>
OFAKERN_LOCAL void skip_block(const Problem<T>& p, Chunk<T>& c, i64 block) {
  for (i64 token = 0; token < c.count; ++token) {
    const i64 index = block * c.capacity + token;
    c.block_max[index] = -kInfinity;
    c.block_sum[index] = c.block_gap[index] = c.block_count[index] = 0.0f;
    if (c.block_best != nullptr) c.block_best[index] = -1;
    if (p.labels[c.row(token)] / kBlock == block) c.label_score[token] = -kInfinity;
  }
}

// A task of the forward pass: one block of the vocabulary with all tokens of the chunk.
template <class T>
OFAKERN_LOCAL void score_block(const Problem<T>& p, Chunk<T>& c, const Workbench<T>& bench, i64 block) {
  if (c.skips(block)) return skip_block(p, c, block);
  const RowsOf<Operand<T>> weight = weight_block(p, bench, block);
  for (i64 group = 0; group < c.groups(); ++group) {
    group_scores(p, c, weight, block, group, {bench.scores, kGroup});
    take_label_scores(p, c, bench.scores, block, group);
    for (i64 t = 0; t < c.padded_tokens(group); t += kSide * kWidth) {
      const i64 tile = (block * (c.capacity / kGroup) + group) * kBlock * kGroup;
      const Corner<T> at = {bench.scores + t,
                            c.bits == nullptr ? nullptr : c.bits + group * p.vocabulary + block * kBlock, t,
                            p.block_rows(block), c.stored == nullptr ? nullptr : c.stored + tile + t};
      const i64 index = block * c.capacity + group * kGroup + t;
      if (c.bits != nullptr)
        c.stored != nullptr ? reduce_columns<T, true, true>(c, at, index)
                            : reduce_columns<T, true, false>(c, at, index);
      else
        c.stored != nullptr ? reduce_columns<T, false, true>(c, at, index)
                            : reduce_columns<T, false, false>(c, at, index);
    }
    if (c.block_best != nullptr) find_best(p, c, bench.scores, block, group);
  }
}

// lse, allowed ids and the smoothing term sum_j (lse - s_j) of one token, from its blocks in their order.
template <class T>
struct TokenSums {
  float lse, allowed, smooth;
  i64 best = kIgnored;

  TokenSums(const Problem<T>& p, const Chunk<T>& c, i64 token) {
    float top = -kInfinity, sum = 0.0f;
    for (i64 b = 0; b < p.blocks(); ++b) {
      const float block_top = c.block_max[b * c.capacity + token];
      if (!(block_top > top)) continue;
      top = block_top;
      if (c.block_best != nullptr) best = b * kBlock + c.block_best[b * c.capacity + token];
    }
    const float base = top == -kInfinity ? 0.0f : top;
    for (i64 b = 0; b < p.blocks(); ++b)
      if (c.block_sum[b * c.capacity + token] != 0.0f)
        sum += c.block_sum[b * c.capacity + token] *
               __builtin_exp2f((c.block_max[b * c.capacity + token] - base) * kLog2e);
    lse = base + __builtin_logf(sum);
    allowed = smooth = 0.0f;
    for (i64 b = 0; b < p.blocks(); ++b) {
      const float count = p.masked() ? c.block_count[b * c.capacity + token] : static_cast<float>(p.block_rows(b));
      if (count == 0.0f) continue;
      allowed += count;
      smooth += count * (lse - c.block_max[b * c.capacity + token]) - c.block_gap[b * c.capacity + token];
    }
  }
};

// d loss / d score = (1 - epsilon - each + each * allowed) * p - each, less (1 - epsilon - each) at the label.
template <class T>
OFAKERN_LOCAL void set_coefficients(const Problem<T>& p, Chunk<T>& c, i64 token, float dloss) {
  const float allowed = c.allowed[token];
  const float each = allowed > 1.0f ? p.epsilon / (allowed - 1.0f) : 0.0f;
  c.scale[token] = dloss * (1.0f - p.epsilon - each + each * allowed);
  c.each[token] = dloss * each;
  c.label_scale[token] = dloss * (1.0f - p.epsilon - each);
}

template <class T>
OFAKERN_LOCAL void finish_losses(const Problem<T>& p, Chunk<T>& c, const CrossEntropyLosses& out, i64 group) {
  for (i64 t = 0; t < c.group_tokens(group); ++t) {
    const i64 token = group * kGroup + t, row = c.row(token);
    const TokenSums<T> sums(p, c, token);
    const float nll = sums.lse - c.label_score[token];
    const float each = sums.allowed > 1.0f ? p.epsilon / (sums.allowed - 1.0f) : 0.0f;
    c.lse[token] = sums.lse;
    c.allowed[token] = sums.allowed;
    out.nll.as<float>()[row] = nll;
    out.lse.as<float>()[row] = sums.lse;
    out.loss.as<float>()[row] = (1.0f - p.epsilon - each) * nll + each * sums.smooth;
    if (out.best.defined()) out.best.as<i64>()[row] = sums.best;
    set_coefficients(p, c, token, 1.0f);
  }
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

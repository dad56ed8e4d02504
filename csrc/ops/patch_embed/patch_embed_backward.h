// Backward pass: y again, its gradient row by row, then one product summed over tokens for the weight.
#pragma once

#include "ops/patch_embed/patch_embed_parts.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// A task of the weight's gradient owns kGradientRows rows of it over one group of tokens, kGradientTokens at a time.
constexpr i64 kGradientRows = 384, kGradientTokens = 256, kTokensOfGroup = 4096, kMaxGroups = 8;
constexpr i64 kPositionColumns = 64;

OFAKERN_HOT i64 token_groups(i64 tokens) { return min_of(kMaxGroups, ceil_div(tokens, kTokensOfGroup)); }

// One task's operands.
template <class T>
struct GradientScratch {
  using Elem = Packed<T>;
  Elem* dy;      // [kGradientTokens, kGradientRows] and, as pairs of tokens,
  Elem* pairs;   // [kGradientTokens / 2, kGradientRows, 2]
  Elem* a;       // [kGradientRows, lda]
  Elem* pixels;  // [kGradientTokens, k]
  Elem* panels;  // pixels as a weight
  static constexpr i64 lda = kGradientTokens + 32;

  static GradientScratch take(const PatchProblem<T>& p, Arena& arena) {
    GradientScratch s = {};
    s.dy = arena.take<Elem>(kGradientTokens * kGradientRows);
    s.pairs = arena.take<Elem>(kGradientTokens * kGradientRows);
    s.a = arena.take<Elem>(kGradientRows * lda);
    s.pixels = arena.take<Elem>(kGradientTokens * p.k);
    s.panels = arena.take<Elem>(weight_elements<Elem>(p.k, kGradientTokens));
    return s;
  }
};

template <class T>
struct PatchBackwardMemory {
  using Elem = Packed<T>;
  FoldedWeight<T> weight;
  char* scratch;   // of the product of y
  T* dy;           // [N, D]; null without LayerNorm, where it is dout
  float* partial;  // [blocks, 3, D]: sums of dy, dout * unit, dout
  i64 blocks;
  float* sums;  // [groups, D rounded up, ld] of the weight's gradient
  i64 group_rows, ld;
  char* threads;  // own pieces
  i64 bytes_per_thread;

  // Rows that one epilogue call covers.
  static i64 block_rows(const MatmulPlan<Elem>& plan) { return plan.skinny ? 1 : plan.rows; }

  static PatchBackwardMemory take(const PatchProblem<T>& p, int threads, Arena& arena) {
    const MatmulPlan<Elem> plan = plan_matmul<Elem>(p.tokens, p.width, p.k, true);
    PatchBackwardMemory m = {};
    m.weight = FoldedWeight<T>::take(p, arena);
    m.scratch = arena.take<char>(matmul_scratch<Elem, Elem>(plan, threads));
    if (p.in->ln_weight.defined()) m.dy = arena.take<T>(p.tokens * p.width);
    m.blocks = ceil_div(p.tokens, block_rows(plan));
    m.partial = arena.take<float>(max_of<i64>(m.blocks, 1) * 3 * p.width);
    m.group_rows = round_up(p.width, 32);
    m.ld = round_up(p.k, 64) + 16;
    m.sums = arena.take<float>(token_groups(p.tokens) * m.group_rows * m.ld);
    Arena gradient(nullptr), position(nullptr);
    GradientScratch<T>::take(p, gradient);
    if (p.in->position.defined()) position.take<float>(p.in->position.shape[0] * kPositionColumns);
    m.bytes_per_thread = max_of(gradient.used(), position.used());
    m.threads = arena.take<char>(m.bytes_per_thread * threads);
    return m;
  }
};

// ---- dy ------------------------------------------------------------------------------------------------------------

// One row through LayerNorm's gradient: dy = rstd (g - mean g - unit mean(g unit)), g = dout gain.
template <class T>
OFAKERN_LOCAL void normalise_backward(const PatchProblem<T>& p, RowStatistics s, const T* dout, const float* y,
                                      float* partial, T* dy) {
  const float* gain = p.in->ln_weight.template as<const float>();
  float *sum_dy = partial, *sum_gain = partial + p.width, *sum_bias = partial + 2 * p.width;
  const Vec mean = vset(s.mean), rstd = vset(s.rstd);
  Vec sum_g = vzero(), sum_gu = vzero();
  for (i64 x = 0; x < p.width; x += kWidth) {
    const i64 left = p.width - x;
    const Vec d = vload_n(dout + x, left), u = vmul(vsub(vload(y + x), mean), rstd);
    const Vec g = vmul(d, vload_n(gain + x, left));
    vstore_n(sum_gain + x, vfma(d, u, vload_n(sum_gain + x, left)), left);
    vstore_n(sum_bias + x, vadd(d, vload_n(sum_bias + x, left)), left);
    sum_g = vadd(sum_g, g);
    sum_gu = vfma(g, u, sum_gu);
  }
  const float inverse = 1.0f / static_cast<float>(p.width);
  const Vec mean_g = vset(hsum(sum_g) * inverse), mean_gu = vset(-hsum(sum_gu) * inverse);
  for (i64 x = 0; x < p.width; x += kWidth) {
    const i64 left = p.width - x;
    const Vec g = vmul(vload_n(dout + x, left), vload_n(gain + x, left)), u = vmul(vsub(vload(y + x), mean), rstd);
    const Vec row = vmul(rstd, vfma(u, mean_gu, vsub(g, mean_g)));
    vstore_n(sum_dy + x, vadd(row, vload_n(sum_dy + x, left)), left);
    vstore_n(dy + x, row, left);
  }
}

// gemm_driver's epilogue: y becomes dy.
template <class T>
struct WriteGradients {
  const PatchProblem<T>& p;
  const PatchBackwardMemory<T>& m;
  const T* dout;
  i64 block_rows;

  void operator()(i64 row, i64 rows, i64, i64, float* c, i64 ldc) const {
    float* partial = m.partial + row / block_rows * 3 * p.width;
    zero_row(partial, 3 * p.width);
    PositionWalk<T> position(p, row);
    for (i64 r = 0; r < rows; ++r, c += ldc) {
      if (r > 0) position.next();
      const RowStatistics s = finish_row(m.weight, p.width, position.row(), c, static_cast<float>(p.in->eps));
      const i64 at = (row + r) * p.width;
      normalise_backward(p, s, dout + at, c, partial, m.dy + at);
    }
  }
};

template <class T>
OFAKERN_LOCAL void compute_dy(const PatchProblem<T>& p, PatchBackwardMemory<T>& m, const T* dout, int threads) {
  using Elem = Packed<T>;
  const MatmulPlan<Elem> plan = plan_matmul<Elem>(p.tokens, p.width, p.k, true);
  const i64 block_rows = PatchBackwardMemory<T>::block_rows(plan);
  if (!p.in->ln_weight.defined()) {
    set_centres(p, m.weight);
    parallel_for(m.blocks, threads, [&](i64 block, int) {
      float* partial = m.partial + block * 3 * p.width;
      zero_row(partial, 3 * p.width);
      for (i64 t = block * block_rows; t < min_of(p.tokens, (block + 1) * block_rows); ++t)
        for (i64 x = 0; x < p.width; x += kWidth) {
          const i64 left = p.width - x;
          vstore_n(partial + x, vadd(vload_n(partial + x, left), vload_n(dout + t * p.width + x, left)), left);
        }
    });
    return;
  }
  fold_weight(p, m.weight, threads);
  const Weight<Elem> weight = make_weight<Elem, Elem>(m.weight.panels, p.width, p.k);
  with_pixels(p, [&](auto pixel) {
    multiply(plan, weight, m.scratch, threads, PatchRows<decltype(pixel), T>{p, m.weight.centre},
             WriteGradients<T>{p, m, dout, block_rows});
  });
}

// partial's blocks into block 0, in their order.
template <class T>
OFAKERN_LOCAL void reduce_partials(const PatchProblem<T>& p, PatchBackwardMemory<T>& m, int threads) {
  const i64 columns = 3 * p.width;
  parallel_for(ceil_div(columns, 64), threads, [&](i64 task, int) {
    for (i64 x = task * 64; x < min_of(columns, task * 64 + 64); x += kWidth) {
      const i64 left = min_of(columns, task * 64 + 64) - x;
      Vec sum = vzero();
      for (i64 b = 0; b < m.blocks; ++b) sum = vadd(sum, vload_n(m.partial + b * columns + x, left));
      vstore_n(m.partial + x, sum, left);
    }
  });
}

// ---- the weight's gradient -----------------------------------------------------------------------------------------

// dy [tokens, rows] to A operand [rows, lda] over tokens.
template <class T>
OFAKERN_LOCAL void pack_dy(const PatchProblem<T>& p, GradientScratch<T>& s, const T* dy, i64 first, i64 rows,
                           i64 tokens, i64 depth) {
  using Elem = Packed<T>;
  constexpr i64 kPair = Gemm<Elem>::kPair;
  for (i64 t = 0; t < tokens; ++t) copy_row(dy + t * p.width + first, rows, s.dy + t * kGradientRows, rows);
  for (i64 t = tokens; t < depth; ++t) zero_row(s.dy + t * kGradientRows, rows);
  interleave(s.dy, kGradientRows, depth, rows, as_units(s.pairs), kGradientRows);
  transpose_units(as_units(s.pairs), kGradientRows, depth / kPair, rows, as_units(s.a), s.lda / kPair);
}

template <class Pixel, class T>
OFAKERN_LOCAL void pack_pixels(const PatchProblem<T>& p, GradientScratch<T>& s, const float* centre, i64 token,
                               i64 tokens) {
  using Elem = Packed<T>;
  PatchWalk<T> walk(p, token);
  for (i64 t = 0; t < tokens; ++t) {
    if (t > 0) walk.next();
    centred_patch<Pixel>(p, walk, centre, s.pixels + t * p.k);
  }
  pack_panels(WeightSource<Elem>{s.pixels, 1, p.k}, p.k, tokens, 0, ceil_div(p.k, Blocking<Elem>::kColumns), s.panels);
}

template <class Pixel, class T>
OFAKERN_LOCAL void sum_group(const PatchProblem<T>& p, PatchBackwardMemory<T>& m, GradientScratch<T>& s, const T* dy,
                             i64 first, i64 group) {
  using Elem = Packed<T>;
  const i64 rows = min_of(kGradientRows, p.width - first), groups = token_groups(p.tokens);
  const i64 chunks = ceil_div(p.tokens, kGradientTokens);
  const i64 begin = group * chunks / groups * kGradientTokens;
  const i64 end = min_of(p.tokens, (group + 1) * chunks / groups * kGradientTokens);
  float* sums = m.sums + (group * m.group_rows + first) * m.ld;
  // Rows that only fill up a tile.
  for (i64 r = rows; r < round_up(rows, Gemm<Elem>::kRows); ++r) zero_row(s.a + r * s.lda, kGradientTokens);
  for (i64 token = begin; token < end; token += kGradientTokens) {
    const i64 tokens = min_of(kGradientTokens, end - token);
    const Weight<Elem> pixels = make_weight<Elem, Elem>(s.panels, p.k, tokens);
    pack_dy(p, s, dy + token * p.width, first, rows, tokens, pixels.depth);
    pack_pixels<Pixel>(p, s, m.weight.centre, token, tokens);
    block_product<Elem, Elem>(round_up(rows, Gemm<Elem>::kRows), s.a, s.lda, pixels, 0, p.k, sums, m.ld, nullptr,
                              token > begin);
  }
}

// dweight = scale (sum of dy times centred pixels) + offset (sum of dy), channel by channel.
template <class T>
OFAKERN_LOCAL void finish_weight_row(const PatchProblem<T>& p, const PatchBackwardMemory<T>& m, i64 d, T* dst) {
  const Normaliser normal = make_normaliser(p);
  const i64 groups = token_groups(p.tokens);
  each_weight(p, [&](i64 native, i64 packed, i64 c) {
    float sum = 0.0f;
    for (i64 g = 0; g < groups; ++g) sum += m.sums[(g * m.group_rows + d) * m.ld + packed];
    from_float(static_cast<float>(normal.scale[c]) * sum + static_cast<float>(normal.offset(c)) * m.partial[d],
               dst + native);
  });
}

template <class T>
OFAKERN_LOCAL void weight_gradient(const PatchProblem<T>& p, PatchBackwardMemory<T>& m, const T* dy,
                                   const TensorView& dweight, int threads) {
  const i64 groups = token_groups(p.tokens);
  with_pixels(p, [&](auto pixel) {
    parallel_for(groups * ceil_div(p.width, kGradientRows), threads, [&](i64 task, int thread) {
      Arena own(m.threads + m.bytes_per_thread * thread);
      GradientScratch<T> scratch = GradientScratch<T>::take(p, own);
      const AmxTiles tiles;
      sum_group<decltype(pixel)>(p, m, scratch, dy, task / groups * kGradientRows, task % groups);
    });
  });
  parallel_for(p.width, threads, [&](i64 d, int) { finish_weight_row(p, m, d, dweight.as<T>() + d * p.k); });
}

// ---- the position table's gradient ---------------------------------------------------------------------------------

template <class T>
OFAKERN_LOCAL void position_gradient(const PatchProblem<T>& p, PatchBackwardMemory<T>& m, const T* dy,
                                     const TensorView& dposition, int threads) {
  const i64 places = dposition.shape[0];
  parallel_for(ceil_div(p.width, kPositionColumns), threads, [&](i64 task, int thread) {
    Arena own(m.threads + m.bytes_per_thread * thread);
    float* sums = own.take<float>(places * kPositionColumns);
    zero_row(sums, places * kPositionColumns);
    const i64 first = task * kPositionColumns, columns = min_of(kPositionColumns, p.width - first);
    if (p.tokens > 0) {
      PositionWalk<T> walk(p, 0);
      for (i64 t = 0; t < p.tokens; ++t) {
        if (t > 0) walk.next();
        float* to = sums + walk.place() * kPositionColumns;
        const T* row = dy + t * p.width + first;
        for (i64 x = 0; x < columns; x += kWidth) vstore(to + x, vadd(vload(to + x), vload_n(row + x, columns - x)));
      }
    }
    for (i64 place = 0; place < places; ++place)
      copy_row(sums + place * kPositionColumns, columns, dposition.as<T>() + place * p.width + first, columns);
  });
}

OFAKERN_LOCAL void copy_vector(const float* src, const TensorView& dst, i64 width) {
  if (dst.defined()) copy_row(src, width, dst.as<float>(), width);
}

template <class T>
OFAKERN_LOCAL void patch_backward(const PatchEmbedInputs& in, const TensorView& dout,
                                  const PatchEmbedGradients& gradients, void* workspace, int threads) {
  const PatchProblem<T> p = make_patch_problem<T>(in);
  Arena arena(workspace);
  PatchBackwardMemory<T> m = PatchBackwardMemory<T>::take(p, threads, arena);
  compute_dy(p, m, dout.as<const T>(), threads);
  reduce_partials(p, m, threads);
  const T* dy = in.ln_weight.defined() ? m.dy : dout.as<const T>();
  weight_gradient(p, m, dy, gradients.dweight, threads);
  if (in.position.defined()) position_gradient(p, m, dy, gradients.dposition, threads);
  copy_vector(m.partial, gradients.dbias, p.width);
  copy_vector(m.partial + p.width, gradients.dln_weight, p.width);
  copy_vector(m.partial + 2 * p.width, gradients.dln_bias, p.width);
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

// Forward pass: one product whose rows of A are read from pixels and whose epilogue writes normalised tokens.
#pragma once

#include "core/vec_stream.h"
#include "ops/patch_embed/patch_embed_parts.h"

namespace ofakern::OFAKERN_ISA {
namespace {

template <class T>
struct PatchForwardMemory {
  using Elem = Packed<T>;
  FoldedWeight<T> weight;
  char* scratch;

  static PatchForwardMemory take(const PatchProblem<T>& p, int threads, Arena& arena) {
    PatchForwardMemory m = {};
    m.weight = FoldedWeight<T>::take(p, arena);
    m.scratch = arena.take<char>(matmul_scratch<Elem, Elem>(plan_matmul<Elem>(p.tokens, p.width, p.k, true), threads));
    return m;
  }
};

// Two vectors side by side: of bf16 one whole cache line, which leaves in one piece.
template <class T>
OFAKERN_HOT void vstore_two(T* p, Vec a, Vec b, bool stream) {
  vstore_out(p, a, kWidth, stream);
  vstore_out(p + kWidth, b, kWidth, stream);
}
#if defined(__AVX512BF16__)
OFAKERN_HOT void vstore_two(bf16* p, Vec a, Vec b, bool stream) {
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v));
  if (stream)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
  else
    _mm512_storeu_si512(p, both);
}
#endif

// gemm_driver's epilogue: y, LayerNorm, rounding.
template <class T>
struct WriteTokens {
  const PatchProblem<T>& p;
  const FoldedWeight<T>& weight;
  T* out;
  bool stream;  // past the caches

  void operator()(i64 row, i64 rows, i64, i64, float* c, i64 ldc) const {
    PositionWalk<T> position(p, row);
    for (i64 r = 0; r < rows; ++r, c += ldc) {
      if (r > 0) position.next();
      const RowStatistics s = finish_row(weight, p.width, position.row(), c, static_cast<float>(p.in->eps));
      write(c, s, out + (row + r) * p.width);
    }
    if (stream) stream_fence();
  }

 private:
  void write(const float* y, RowStatistics s, T* dst) const {
    if (!p.in->ln_weight.defined()) {
      for (i64 x = 0; x < p.width; x += kWidth) vstore_out(dst + x, vload(y + x), p.width - x, stream);
      return;
    }
    const float* gain = p.in->ln_weight.template as<const float>();
    const float* bias = p.in->ln_bias.template as<const float>();
    const Vec rstd = vset(s.rstd), mean = vset(s.mean);
    const auto normal = [&](i64 x) {
      return vfma(vmul(vsub(vload(y + x), mean), rstd), vload(gain + x), vload(bias + x));
    };
    i64 x = 0;
    for (; x + 2 * kWidth <= p.width; x += 2 * kWidth) vstore_two(dst + x, normal(x), normal(x + kWidth), stream);
    for (; x + kWidth <= p.width; x += kWidth) vstore_out(dst + x, normal(x), kWidth, stream);
    if (x < p.width) {
      const int left = static_cast<int>(p.width - x);
      const Vec unit = vmul(vsub(vload(y + x), mean), rstd);
      vstore_partial(dst + x, vfma(unit, vload_partial(gain + x, left), vload_partial(bias + x, left)), left);
    }
  }
};

template <class T>
OFAKERN_LOCAL void patch_forward(const PatchEmbedInputs& in, const TensorView& out, void* workspace, int threads) {
  using Elem = Packed<T>;
  const PatchProblem<T> p = make_patch_problem<T>(in);
  if (p.tokens == 0) return;
  Arena arena(workspace);
  PatchForwardMemory<T> memory = PatchForwardMemory<T>::take(p, threads, arena);
  fold_weight(p, memory.weight, threads);
  const Weight<Elem> weight = make_weight<Elem, Elem>(memory.weight.panels, p.width, p.k);
  T* tokens = out.as<T>();
  const bool stream = should_stream(tokens, p.width, p.tokens * p.width * static_cast<i64>(sizeof(T)));
  const WriteTokens<T> epilogue = {p, memory.weight, tokens, stream};
  with_pixels(p, [&](auto pixel) {
    multiply(plan_matmul<Elem>(p.tokens, p.width, p.k, true), weight, memory.scratch, threads,
             PatchRows<decltype(pixel), T>{p, memory.weight.centre}, epilogue);
  });
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

// Whole matrix products around gemm.h's kernels: C[M, N] = epilogue( prologue(A)[M, K] · B[K, N] ), summed in f32.
//
// How an op uses it, for operands of storage type T (Elem = Packed<T>: bf16 where the ISA multiplies it, else f32):
//
//   1. B, the weight, is packed once into panels: pack_weight(...) from any strides, on the fly or kept ("prepacked").
//      Weight<Stored> names it. Stored is Elem, or a narrower type that the product widens panel by panel in the first
//      level cache: int8 (the epilogue multiplies by its scale per column), bf16 and f16 where Elem is f32.
//   2. MatmulPlan<Elem> plan = plan_matmul<Elem>(m, n, k, whole_rows) fixes blocks and tasks from the shapes alone.
//   3. multiply(plan, weight, scratch, threads, prologue, epilogue) with matmul_scratch<Elem, Stored>(plan, threads)
//      bytes of scratch.
//        prologue(row, rows, Elem* dst, ld): writes rows [row, row + rows) of A, dst[r * ld + k] for k in
//          [0, plan.depth), with zeros from K on. It may read pixels, gather rows, normalise: it sees whole rows.
//        epilogue(row, rows, column, columns, float* c, ldc): c[r * ldc + n] is C[row + r, column + n], ready; it may
//          be overwritten. Under whole_rows column is 0 and columns is N (LayerNorm).
//      Each element of C reaches one epilogue call; which rows and columns share a call never depends on the threads.
//      Up to kSkinnyRows rows the weight streams through once and tasks share its columns; else tasks share the rows.
//
// An op with loops of its own (a vocabulary cut into blocks, a gradient summed over tokens) calls block_product on
// packed operands instead: one thread, no scratch but a widened panel.
#pragma once

#include "core/arena.h"
#include "core/pack.h"
#include "core/parallel.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// Columns of a weight panel, and how deep a slice of one stays in the first-level cache while rows go by.
template <class Elem>
struct Blocking {
  static constexpr i64 kColumns = kPanel, kDepthStep = 32 * 1024 / (kPanel * static_cast<i64>(sizeof(Elem)));
};
#if defined(OFAKERN_AMX)
// One tile wide: its rows stand one behind the other. Deep, because results go through memory once per slice: at a
// depth of 768 one slice is 8 % faster than two, though it fills the cache.
template <>
struct Blocking<bf16> {
  static constexpr i64 kColumns = 16, kDepthStep = 1024;
};
#endif

constexpr i64 kSkinnyRows = 96;
constexpr i64 kSkinnyColumns = 64;  // of one task at least; a multiple of every panel

template <class Elem>
OFAKERN_HOT i64 packed_depth(i64 k) {
  return round_up(k, Gemm<Elem>::kDepth);
}

// A packed weight: panel p holds columns [p, p + 1) * Blocking<Elem>::kColumns at data + p * panel_stride.
template <class Stored>
struct Weight {
  const Stored* data;
  i64 n, k;
  i64 depth;  // k rounded up
};

template <class Elem, class Stored>
OFAKERN_HOT Weight<Stored> make_weight(const Stored* data, i64 n, i64 k) {
  return {data, n, k, packed_depth<Elem>(k)};
}

// Elements that pack_weight writes.
template <class Elem>
OFAKERN_HOT i64 weight_elements(i64 n, i64 k) {
  return round_up(n, Blocking<Elem>::kColumns) * packed_depth<Elem>(k);
}

// ---- packing a weight ----------------------------------------------------------------------------------------------

// What pack_weight reads: element (n, k) is data[n * n_stride + k * k_stride]; one of the strides is 1.
template <class T>
struct WeightSource {
  const T* data;
  i64 n_stride, k_stride;
};

OFAKERN_HOT void store_pair_rows(float* dst, const Vec& even, const Vec&) { vstore(dst, even); }
#if defined(OFAKERN_NATIVE_BF16)
OFAKERN_HOT void store_pair_rows(bf16* dst, const Vec& even, const Vec& odd) { vstore_pairs(dst, even, odd); }
#endif

// Rows of k stand contiguously: pairs of them are interleaved. dst: one panel.
template <class T, class Elem>
OFAKERN_LOCAL void pack_panel_by_rows(const T* src, i64 k_stride, i64 columns, i64 k, Elem* dst) {
  constexpr i64 kPair = Gemm<Elem>::kPair, kColumns = Blocking<Elem>::kColumns;
  for (i64 k0 = 0; k0 < k; k0 += kPair)
    for (i64 x = 0; x < kColumns; x += kWidth) {
      const i64 left = columns - x;
      const T* row = src + k0 * k_stride + x;
      const Vec even = left > 0 ? vload_n(row, left) : vzero();
      const Vec odd = left > 0 && kPair == 2 && k0 + 1 < k ? vload_n(row + k_stride, left) : vzero();
      store_pair_rows(dst + (k0 / kPair * kColumns + x) * kPair, even, odd);
    }
}

// Every column's k stand contiguously (torch's Linear): units of k are transposed. dst: one panel.
template <class T, class Elem>
OFAKERN_LOCAL void pack_panel_by_columns(const T* src, i64 n_stride, i64 columns, i64 k, Elem* dst) {
  constexpr i64 kPair = Gemm<Elem>::kPair, kColumns = Blocking<Elem>::kColumns, kChunk = 64 * kPair;
  alignas(64) Elem rows[kColumns * kChunk];
  const i64 padded = round_up(columns, kWidth);  // further columns are never read
  for (i64 n = columns; n < padded; ++n) zero_row(rows + n * kChunk, kChunk);
  for (i64 k0 = 0; k0 < k; k0 += kChunk) {
    const i64 width = min_of(kChunk, k - k0), units = ceil_div(width, kPair);
    for (i64 n = 0; n < columns; ++n) copy_row(src + n * n_stride + k0, width, rows + n * kChunk, units * kPair);
    transpose_units(as_units(rows), kChunk / kPair, padded, units, as_units(dst + k0 * kColumns), kColumns);
  }
}

// Panels [first, last) of a weight packed as Elem.
template <class T, class Elem>
OFAKERN_LOCAL void pack_panels(const WeightSource<T>& src, i64 n, i64 k, i64 first, i64 last, Elem* dst) {
  constexpr i64 kColumns = Blocking<Elem>::kColumns;
  const i64 depth = packed_depth<Elem>(k), written = round_up(k, Gemm<Elem>::kPair);
  for (i64 p = first; p < last; ++p) {
    const i64 columns = min_of(kColumns, n - p * kColumns);
    const T* from = src.data + p * kColumns * src.n_stride;
    Elem* panel = dst + p * kColumns * depth;
    if (src.k_stride == 1)
      pack_panel_by_columns(from, src.n_stride, columns, k, panel);
    else
      pack_panel_by_rows(from, src.k_stride, columns, k, panel);
    zero_row(panel + written * kColumns, (depth - written) * kColumns);
  }
}

// The whole weight, ready for multiply: weight_elements<Elem>(n, k) elements at dst.
template <class T, class Elem>
OFAKERN_LOCAL void pack_weight(const WeightSource<T>& src, i64 n, i64 k, Elem* dst, int threads) {
  parallel_for(ceil_div(n, Blocking<Elem>::kColumns), threads,
               [&](i64 p, int) { pack_panels(src, n, k, p, p + 1, dst); });
}

// The same order, stored in a type narrower than Elem: no arithmetic, so that int8 stays what it is. Rows of k
// contiguous per column, as in torch's Linear.
template <class Elem, class Stored>
OFAKERN_LOCAL void pack_weight_as_stored(const Stored* src, i64 n, i64 k, Stored* dst, int threads) {
  constexpr i64 kPair = Gemm<Elem>::kPair, kColumns = Blocking<Elem>::kColumns;
  const i64 depth = packed_depth<Elem>(k);
  parallel_for(ceil_div(n, kColumns), threads, [&](i64 p, int) {
    Stored* panel = dst + p * kColumns * depth;
    zero_row(panel, kColumns * depth);
    for (i64 column = p * kColumns; column < min_of(n, (p + 1) * kColumns); ++column)
      for (i64 x = 0; x < k; ++x)
        panel[(x / kPair * kColumns + column % kColumns) * kPair + x % kPair] = src[column * k + x];
  });
}

// ---- products of packed operands -----------------------------------------------------------------------------------

template <class Elem>
OFAKERN_HOT const Elem* widened(const Elem* slice, i64, Elem*) {
  return slice;
}
template <class Stored, class Elem>
OFAKERN_HOT const Elem* widened(const Stored* slice, i64 count, Elem* buffer) {
  for (i64 x = 0; x < count; x += 2 * kWidth) {
    __builtin_prefetch(slice + x + count, 0, 2);  // the next slice: its memory time passes under this one's product
    vstore_as(buffer + x, vload_as(slice + x));
    vstore_as(buffer + x + kWidth, vload_as(slice + x + kWidth));
  }
  return buffer;
}

// Elements of the buffer that block_product widens into (none is used when Stored is Elem).
template <class Elem>
constexpr i64 kSliceElements = Blocking<Elem>::kColumns * Blocking<Elem>::kDepthStep;

template <class Elem>
OFAKERN_LOCAL void slice_rows(int rows, int vecs, i64 groups, const Elem* a, i64 lda, const Elem* b, i64 b_row,
                              float* c, i64 ldc, bool add) {
  const Onto onto = onto_itself(add, c, ldc);
  switch (rows) {
    case 1:
      return gemm_tile_vecs<Elem, 1>(vecs, groups, a, lda, b, b_row, c, ldc, onto);
    case 2:
      return gemm_tile_vecs<Elem, 2>(vecs, groups, a, lda, b, b_row, c, ldc, onto);
    case 3:
      return gemm_tile_vecs<Elem, 3>(vecs, groups, a, lda, b, b_row, c, ldc, onto);
#if defined(__AVX2__)
    case 4:
      return gemm_tile_vecs<Elem, 4>(vecs, groups, a, lda, b, b_row, c, ldc, onto);
    case 5:
      return gemm_tile_vecs<Elem, 5>(vecs, groups, a, lda, b, b_row, c, ldc, onto);
#endif
    default:
      return gemm_tile_vecs<Elem, kTileRows>(vecs, groups, a, lda, b, b_row, c, ldc, onto);
  }
}

// One slice of one panel against all rows of a. stream: the slice comes from memory, and so does what follows it.
template <class Elem>
OFAKERN_LOCAL void slice_product(i64 m, i64 columns, i64 depth, const Elem* a, i64 lda, const Elem* slice, float* c,
                                 i64 ldc, bool add, bool) {
  constexpr i64 kPair = Gemm<Elem>::kPair;
  const int vecs = static_cast<int>(ceil_div(columns, kWidth));
  for (i64 m0 = 0; m0 < m; m0 += kTileRows)
    slice_rows<Elem>(static_cast<int>(min_of<i64>(kTileRows, m - m0)), vecs, depth / kPair, a + m0 * lda, lda, slice,
                     Blocking<Elem>::kColumns * kPair, c + m0 * ldc, ldc, add);
}
#if defined(OFAKERN_AMX)
OFAKERN_LOCAL void slice_product(i64 m, i64, i64 depth, const bf16* a, i64 lda, const bf16* slice, float* c, i64 ldc,
                                 bool add, bool stream) {
  constexpr i64 kRow = 2 * Blocking<bf16>::kColumns;
  for (i64 m0 = 0; m0 < m; m0 += 32) {
    const bf16* rows = a + m0 * lda;
    float* block = c + m0 * ldc;
    const Onto onto = onto_itself(add, block, ldc);
    const bool two = m0 + 16 < m;
    if (stream && m0 == 0)
      two ? amx_block<2, true>(depth, rows, lda, slice, kRow, block, ldc, onto)
          : amx_block<1, true>(depth, rows, lda, slice, kRow, block, ldc, onto);
    else
      two ? amx_block<2>(depth, rows, lda, slice, kRow, block, ldc, onto)
          : amx_block<1>(depth, rows, lda, slice, kRow, block, ldc, onto);
  }
}
#endif

// c[m, columns] (+)= a[m, depth] · columns [first, first + columns) of b; `first` begins a panel. Rows of a come in
// multiples of Gemm<Elem>::kRows; c has room for them and for whole panels. Under AMX the caller holds AmxTiles.
// stream: b is read this once.
template <class Elem, class Stored>
OFAKERN_LOCAL void block_product(i64 m, const Elem* a, i64 lda, const Weight<Stored>& b, i64 first, i64 columns,
                                 float* c, i64 ldc, Elem* slice_buffer, bool add = false, bool stream = false) {
  constexpr i64 kColumns = Blocking<Elem>::kColumns;
  // Slices of equal depth, rather than a short last one.
  const i64 slices = ceil_div(b.depth, Blocking<Elem>::kDepthStep);
  const i64 step = round_up(ceil_div(b.depth, slices), Gemm<Elem>::kDepth);
  for (i64 x = 0; x < columns; x += kColumns) {  // a panel's slices follow one another: the weight is one stream
    for (i64 k0 = 0; k0 < b.depth; k0 += step) {
      const i64 depth = min_of(step, b.depth - k0);
      const Stored* stored = b.data + (first + x) * b.depth + k0 * kColumns;
      const Elem* slice = widened(stored, depth * kColumns, slice_buffer);
      slice_product(m, min_of(kColumns, columns - x), depth, a + k0, lda, slice, c + x, ldc, add || k0 > 0,
                    stream && sizeof(Stored) == sizeof(Elem));
    }
  }
}

// ---- the driver ----------------------------------------------------------------------------------------------------

template <class Elem>
struct MatmulPlan {
  i64 m, n, k, depth;
  i64 lda, ldc;       // of a block's operands: odd multiples of a line, so that rows fall into different cache sets
  i64 rows, columns;  // of a block
  bool whole_rows, skinny;

  i64 row_blocks() const { return ceil_div(m, rows); }
  i64 column_blocks() const { return ceil_div(n, columns); }
};

template <class Elem>
OFAKERN_LOCAL MatmulPlan<Elem> plan_matmul(i64 m, i64 n, i64 k, bool whole_rows) {
  constexpr i64 kLine = 64 / static_cast<i64>(sizeof(Elem)), kBlockRows = 96, kBlockColumns = 1024;
  MatmulPlan<Elem> plan = {m, n, k, packed_depth<Elem>(k), 0, 0, 0, 0, whole_rows, m <= kSkinnyRows};
  plan.lda = round_up(plan.depth, 2 * kLine) + kLine;
  const bool deep = plan.depth * static_cast<i64>(sizeof(Elem)) > 8192;  // a block of A fits half the second level
  plan.rows = plan.skinny ? round_up(m, Gemm<Elem>::kRows) : deep ? kBlockRows / 2 : kBlockRows;
  // A task streams one run of memory: of many columns it takes more, and there are tasks enough all the same.
  const i64 skinny_columns = n >= 256 * kSkinnyColumns ? 4 * kSkinnyColumns : kSkinnyColumns;
  plan.columns = plan.skinny ? skinny_columns : whole_rows ? n : min_of(n, kBlockColumns);
  const i64 held = plan.skinny && whole_rows ? n : plan.columns;
  plan.ldc = round_up(held, 64) + 16;
  return plan;
}

// The pieces of scratch: A (shared when skinny), C (shared when skinny rows are whole), a widened slice.
template <class Elem, class Stored>
struct MatmulScratch {
  Elem* a;
  float* c;
  Elem* slice;

  static MatmulScratch take(const MatmulPlan<Elem>& plan, bool with_a, bool with_c, Arena& arena) {
    const i64 rows = round_up(plan.rows, 32);
    MatmulScratch s = {};
    if (with_a) s.a = arena.take<Elem>(rows * plan.lda);
    if (with_c) s.c = arena.take<float>(rows * plan.ldc);
    if (sizeof(Stored) != sizeof(Elem)) s.slice = arena.take<Elem>(kSliceElements<Elem>);
    return s;
  }
};

template <class Elem, class Stored>
OFAKERN_LOCAL i64 matmul_scratch(const MatmulPlan<Elem>& plan, int threads) {
  using Scratch = MatmulScratch<Elem, Stored>;
  Arena shared(nullptr), own(nullptr);
  const bool share_c = plan.skinny && plan.whole_rows;
  Scratch::take(plan, plan.skinny, share_c, shared);
  Scratch::take(plan, !plan.skinny, !share_c, own);
  return shared.used() + own.used() * threads;
}

// A's rows packed; rows that only fill up a tile are zero.
template <class Elem, class Prologue>
OFAKERN_LOCAL void pack_block(const MatmulPlan<Elem>& plan, i64 row, i64 rows, const Prologue& prologue, Elem* a) {
  prologue(row, rows, a, plan.lda);
  for (i64 r = rows; r < round_up(rows, Gemm<Elem>::kRows); ++r) zero_row(a + r * plan.lda, plan.depth);
}

template <class Elem, class Stored, class Prologue, class Epilogue>
OFAKERN_LOCAL void multiply_blocks(const MatmulPlan<Elem>& plan, const Weight<Stored>& b, void* scratch, int threads,
                                   const Prologue& prologue, const Epilogue& epilogue) {
  using Scratch = MatmulScratch<Elem, Stored>;
  Arena measure(nullptr);
  Scratch::take(plan, true, true, measure);
  const i64 column_blocks = plan.column_blocks();
  parallel_for(plan.row_blocks() * column_blocks, threads, [&](i64 task, int thread) {
    Arena arena(static_cast<char*>(scratch) + measure.used() * thread);
    const Scratch s = Scratch::take(plan, true, true, arena);
    const AmxTiles tiles;
    const i64 row = task / column_blocks * plan.rows, rows = min_of(plan.rows, plan.m - row);
    const i64 column = task % column_blocks * plan.columns, columns = min_of(plan.columns, plan.n - column);
    pack_block(plan, row, rows, prologue, s.a);
    block_product(round_up(rows, Gemm<Elem>::kRows), s.a, plan.lda, b, column, columns, s.c, plan.ldc, s.slice);
    epilogue(row, rows, column, columns, s.c, plan.ldc);
  });
}

template <class Elem, class Stored, class Prologue, class Epilogue>
OFAKERN_LOCAL void multiply_skinny(const MatmulPlan<Elem>& plan, const Weight<Stored>& b, void* scratch, int threads,
                                   const Prologue& prologue, const Epilogue& epilogue) {
  using Scratch = MatmulScratch<Elem, Stored>;
  Arena shared_arena(scratch), measure(nullptr);
  const bool share_c = plan.whole_rows;
  const Scratch shared = Scratch::take(plan, true, share_c, shared_arena);
  Scratch::take(plan, false, !share_c, measure);
  pack_block(plan, 0, plan.m, prologue, shared.a);
  parallel_for(plan.column_blocks(), threads, [&](i64 task, int thread) {
    Arena arena(static_cast<char*>(scratch) + shared_arena.used() + measure.used() * thread);
    const Scratch s = Scratch::take(plan, false, !share_c, arena);
    const bool few = plan.m < 32;
    const AmxTiles tiles(few ? min_of<i64>(plan.m, 16) : 16, few ? max_of<i64>(plan.m - 16, 1) : 16);
    const i64 column = task * plan.columns, columns = min_of(plan.columns, plan.n - column);
    float* c = share_c ? shared.c + column : s.c;
    block_product(plan.rows, shared.a, plan.lda, b, column, columns, c, plan.ldc, s.slice, false, true);
    if (!share_c) epilogue(0, plan.m, column, columns, c, plan.ldc);
  });
  if (share_c)
    parallel_for(plan.m, threads, [&](i64 r, int) { epilogue(r, 1, 0, plan.n, shared.c + r * plan.ldc, plan.ldc); });
}

template <class Elem, class Stored, class Prologue, class Epilogue>
OFAKERN_LOCAL void multiply(const MatmulPlan<Elem>& plan, const Weight<Stored>& b, void* scratch, int threads,
                            const Prologue& prologue, const Epilogue& epilogue) {
  if (plan.m == 0 || plan.n == 0) return;
  if (plan.skinny)
    multiply_skinny(plan, b, scratch, threads, prologue, epilogue);
  else
    multiply_blocks(plan, b, scratch, threads, prologue, epilogue);
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

// One chunk of tokens: sizes, scratch memory, the packed operands, and which ids each token allows.
#pragma once

#include "core/arena.h"
#include "core/operand.h"
#include "core/pack.h"
#include "core/parallel.h"
#include "ops/cross_entropy/cross_entropy.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = __builtin_inff();
constexpr i64 kIgnored = -100;

// What exp(score - maximum) is kept as from the first product to the last two; bf16 rounds its gradients so anyway.
template <class T>
struct StoredOf {
  using type = float;
};
template <>
struct StoredOf<bf16> {
  using type = bf16;
};
template <class T>
using Stored = typename StoredOf<T>::type;

constexpr i64 kBlock = 256;              // vocabulary rows of a task
constexpr i64 kGroup = 64;               // tokens whose scores of one block are in the first-level cache at a time
constexpr i64 kTokenMultiple = 32;       // what every product's own multiples divide
constexpr i64 kMaxChunk = 1024;          // tokens of a chunk
constexpr i64 kStoredBytes = 128 << 20;  // of a chunk's stored exponentials
constexpr i64 kPartials = 8;             // partial sums of dhidden: runs of blocks that a thread adds up in order

template <class T>
struct Problem {
  using Elem = Operand<T>;
  i64 tokens, vocabulary, width;
  i64 depth;  // width as operands are padded
  const T* hidden;
  i64 hidden_stride;
  const T* weight;
  i64 weight_stride;
  const T* bias;
  const i64* labels;
  const i64* offsets;
  const i64* ids;
  const std::int32_t* range;
  i64 range_stride;  // 0: one for all tokens
  i64 always;
  float epsilon;

  bool masked() const { return offsets != nullptr || range != nullptr; }
  i64 blocks() const { return ceil_div(vocabulary, kBlock); }
  i64 block_rows(i64 block) const { return min_of(kBlock, vocabulary - block * kBlock); }
  // The most tokens of a chunk.
  i64 chunk_limit() const {
    const i64 fit = kStoredBytes / (max_of<i64>(vocabulary, 1) * static_cast<i64>(sizeof(Stored<T>))) / kGroup * kGroup;
    return min_of(max_of(min_of(fit, kMaxChunk), kGroup), round_up(max_of<i64>(tokens, 1), kGroup));
  }
};

template <class T>
OFAKERN_LOCAL Problem<T> make_problem(const CrossEntropyInputs& in) {
  using Elem = Operand<T>;
  Problem<T> p = {};
  p.tokens = in.hidden.shape[0];
  p.vocabulary = in.weight.shape[0];
  p.width = in.hidden.shape[1];
  p.depth = round_up(p.width, max_of<i64>(Gemm<Elem>::kDepth, Gemm<Elem>::kColumns));
  p.hidden = in.hidden.as<const T>();
  p.hidden_stride = in.hidden.stride[0];
  p.weight = in.weight.as<const T>();
  p.weight_stride = in.weight.stride[0];
  p.bias = in.bias.defined() ? in.bias.as<const T>() : nullptr;
  p.labels = in.labels.as<const i64>();
  p.offsets = in.offsets.defined() ? in.offsets.as<const i64>() : nullptr;
  p.ids = in.offsets.defined() ? in.ids.as<const i64>() : nullptr;
  p.range = in.range.defined() ? in.range.as<const std::int32_t>() : nullptr;
  p.range_stride = in.range.defined() && in.range.shape[0] > 1 ? 2 : 0;
  p.always = min_of<i64>(in.always, p.vocabulary);
  p.epsilon = static_cast<float>(in.epsilon);
  return p;
}

// Which results a call wants.
struct Wanted {
  bool losses, best, dhidden, dweight, dbias;
  bool gradients() const { return dhidden || dweight || dbias; }
};

// Whether a call with losses and gradients keeps exponentials instead of computing the scores again: it does not where
// AMX makes that product cheaper than the way through memory.
template <class T>
constexpr bool kStores = sizeof(Operand<T>) == sizeof(float);

// Scores of a block's rows and a group's tokens, or their gradients.
struct Tile {
  float* data;
  i64 stride;  // from one row to the next
};

// Rows of tokens as an A operand: an odd multiple of a line apart, so that they fall into different cache sets.
template <class Elem>
OFAKERN_HOT i64 row_stride(i64 chunk) {
  return chunk + 64 / static_cast<i64>(sizeof(Elem));
}

// Scratch of one thread.
template <class T>
struct Workbench {
  using Elem = Operand<T>;
  Elem* weight_rows;    // [kBlock, depth]: A operand of the scores
  Elem* weight_panels;  // B operand [kBlock, depth] of dhidden
  float* scores;        // [kBlock, kGroup]
  Elem* d_rows;         // [kBlock, row_stride(chunk)]: A operand of dweight
  Elem* d_pairs;        // [kBlock / kPair, kGroup] units
  Elem* d_tokens;       // [kGroup, kBlock]: A operand of dhidden
  float* dweight;       // [kBlock, depth]

  static Workbench take(const Problem<T>& p, const Wanted& want, i64 chunk, Arena& arena) {
    Workbench w = {};
    w.weight_rows = arena.take<Elem>(kBlock * p.depth);
    w.scores = arena.take<float>(kBlock * kGroup);
    if (want.dhidden) {
      w.weight_panels = arena.take<Elem>(kBlock * round_up(p.depth, kPanel));
      if (Gemm<Elem>::kPair > 1) w.d_pairs = arena.take<Elem>(kBlock * kGroup);
      w.d_tokens = arena.take<Elem>(kBlock * kGroup);
    }
    if (want.dweight) {
      w.d_rows = arena.take<Elem>(kBlock * row_stride<Elem>(chunk));
      w.dweight = arena.take<float>(kBlock * p.depth);
    }
    return w;
  }
};

// One chunk's operands and statistics. Arrays over tokens have `capacity` entries; tokens are the chunk's, counted
// from 0: those with a label (and a gradient), end to end.
template <class T>
struct Chunk {
  using Elem = Operand<T>;
  i64 capacity;
  i64* chosen;          // [N] packed rows that take part, of all chunks
  i64 first, count;     // of `chosen`
  Elem* columns;        // B operand [depth, tokens] of the scores
  Elem* rows;           // B operand [tokens, depth] of dweight
  Stored<T>* stored;    // exp(score - the block's maximum): [blocks][groups][kBlock][kGroup]
  std::uint64_t* bits;  // [groups][V]: bit t of a word: the group's token t allows the id
  std::uint8_t* used;   // [blocks] 1 when some token allows an id of it
  // Of a block and token: maximum, sum of exp(score - maximum), sum of (score - maximum); [blocks][capacity].
  float *block_max, *block_sum, *block_gap;
  float* block_count;  // [blocks][capacity] ids allowed (masked calls)
  std::int32_t* block_best;
  // Of a token: log-sum-exp, its label's score, allowed ids, and the gradient's coefficients:
  // d s[j] = scale * p[j] - each for every allowed j, less `label_scale` at the label.
  float *lse, *label_score, *allowed, *scale, *each, *label_scale;
  float* dhidden[kPartials];  // [capacity, depth]
  std::uint8_t* started;      // [kPartials]
  float* dbias;               // [V], summed over chunks
  Workbench<T>* benches;

  i64 groups() const { return ceil_div(count, kGroup); }
  i64 group_tokens(i64 group) const { return min_of(kGroup, count - group * kGroup); }
  i64 padded_tokens(i64 group) const { return round_up(group_tokens(group), kTokenMultiple); }
  i64 row(i64 token) const { return chosen[first + token]; }
  bool skips(i64 block) const { return bits != nullptr && used[block] == 0; }

  static Chunk take(const Problem<T>& p, const Wanted& want, int threads, Arena& arena) {
    Chunk c = {};
    const i64 n = c.capacity = p.chunk_limit();
    c.chosen = arena.take<i64>(p.tokens);
    c.columns = arena.take<Elem>(n * p.depth);
    if (want.dweight) c.rows = arena.take<Elem>(n * round_up(p.depth, kPanel));
    if (kStores<T> && want.losses && want.gradients()) c.stored = arena.take<Stored<T>>(p.blocks() * kBlock * n);
    if (p.masked()) {
      c.bits = arena.take<std::uint64_t>(n / kGroup * p.vocabulary);
      c.used = arena.take<std::uint8_t>(p.blocks());
    }
    if (want.losses) {
      c.block_max = arena.take<float>(p.blocks() * n);
      c.block_sum = arena.take<float>(p.blocks() * n);
      c.block_gap = arena.take<float>(p.blocks() * n);
      if (p.masked()) c.block_count = arena.take<float>(p.blocks() * n);
      if (want.best) c.block_best = arena.take<std::int32_t>(p.blocks() * n);
    }
    float** const of_tokens[] = {&c.lse, &c.label_score, &c.allowed, &c.scale, &c.each, &c.label_scale};
    for (float** part : of_tokens) *part = arena.take<float>(n);
    if (want.dhidden) {
      for (float*& partial : c.dhidden) partial = arena.take<float>(n * p.depth);
      c.started = arena.take<std::uint8_t>(kPartials);
    }
    if (want.dbias) c.dbias = arena.take<float>(p.vocabulary);
    c.benches = arena.take<Workbench<T>>(threads);
    for (int t = 0; t < threads; ++t) {
      const Workbench<T> bench = Workbench<T>::take(p, want, n, arena);
      if (c.benches != nullptr) c.benches[t] = bench;
    }
    return c;
  }
};

// Hidden rows of the chunk as the two B operands; a task is a group of tokens.
template <class T>
OFAKERN_LOCAL void pack_group(const Problem<T>& p, Chunk<T>& c, Workbench<T>& bench, i64 group) {
  using Elem = Operand<T>;
  constexpr int kPair = Gemm<Elem>::kPair;
  Elem* staging = bench.weight_rows;  // free between blocks; kGroup <= kBlock
  for (i64 t = 0; t < kGroup; ++t) {
    if (t < c.group_tokens(group))
      copy_row(p.hidden + c.row(group * kGroup + t) * p.hidden_stride, p.width, staging + t * p.depth, p.depth);
    else
      zero_row(staging + t * p.depth, p.depth);
  }
  for (i64 t = 0; t < kGroup; t += kPanel)
    transpose_units(as_units(staging + t * p.depth), p.depth / kPair, kPanel, p.depth / kPair,
                    as_units(c.columns + (group * kGroup + t) * p.depth), kPanel);
  if (c.rows == nullptr) return;
  for (i64 d = 0; d < p.depth; d += kPanel)
    interleave(staging + d, p.depth, kGroup, min_of<i64>(kPanel, p.depth - d),
               as_units(c.rows + d * c.capacity + group * kGroup * kPanel), kPanel);
}

// Bits of one group of tokens. A range flips its bit where it begins and where it ends; a running xor over the ids
// makes intervals of the flips.
template <class T>
OFAKERN_LOCAL void mark_allowed(const Problem<T>& p, Chunk<T>& c, i64 group) {
  std::uint64_t* bits = c.bits + group * p.vocabulary;
  std::memset(bits, 0, static_cast<std::size_t>(p.vocabulary) * sizeof *bits);
  const auto flip = [&](i64 lo, i64 hi, std::uint64_t bit) {
    if (lo >= hi) return;
    bits[lo] ^= bit;
    if (hi < p.vocabulary) bits[hi] ^= bit;
  };
  for (i64 t = 0; t < c.group_tokens(group); ++t) {
    const i64 row = c.row(group * kGroup + t);
    const std::uint64_t bit = std::uint64_t{1} << t;
    if (p.offsets != nullptr) {
      if (p.offsets[row] == p.offsets[row + 1]) flip(0, p.vocabulary, bit);
      continue;
    }
    const std::int32_t* range = p.range + row * p.range_stride;
    flip(0, p.always, bit);
    flip(max_of<i64>(range[0], p.always), min_of<i64>(range[1], p.vocabulary), bit);
  }
  for (i64 v = 1; v < p.vocabulary; ++v) bits[v] ^= bits[v - 1];
  if (p.offsets == nullptr) return;
  for (i64 t = 0; t < c.group_tokens(group); ++t) {
    const i64 row = c.row(group * kGroup + t);
    for (i64 n = p.offsets[row]; n < p.offsets[row + 1]; ++n) bits[p.ids[n]] |= std::uint64_t{1} << t;
  }
}

template <class T>
OFAKERN_LOCAL void find_used(const Problem<T>& p, Chunk<T>& c, i64 block) {
  std::uint64_t any = 0;
  for (i64 group = 0; group < c.groups(); ++group) {
    const std::uint64_t* bits = c.bits + group * p.vocabulary + block * kBlock;
    for (i64 r = 0; r < p.block_rows(block); ++r) any |= bits[r];
  }
  c.used[block] = any != 0;
}

// An A operand.
template <class Elem>
struct RowsOf {
  const Elem* data;
  i64 stride;
};

// The block's rows of weight as operands: in place where they are stored as the product wants them.
template <class T>
OFAKERN_HOT RowsOf<T> in_place(const Problem<T>& p, i64 block, const T*) {
  const bool fits = p.width == p.depth && p.block_rows(block) % kTokenMultiple == 0;
  return {fits ? p.weight + block * kBlock * p.weight_stride : nullptr, p.weight_stride};
}
template <class T, class Elem>
OFAKERN_HOT RowsOf<Elem> in_place(const Problem<T>&, i64, const Elem*) {
  return {nullptr, 0};
}

template <class T>
OFAKERN_LOCAL RowsOf<Operand<T>> weight_block(const Problem<T>& p, const Workbench<T>& bench, i64 block) {
  using Elem = Operand<T>;
  RowsOf<Elem> rows = in_place(p, block, static_cast<const Elem*>(nullptr));
  if (rows.data != nullptr) return rows;
  const i64 count = p.block_rows(block);
  for (i64 r = 0; r < round_up(count, kTokenMultiple); ++r) {
    if (r < count)
      copy_row(p.weight + (block * kBlock + r) * p.weight_stride, p.width, bench.weight_rows + r * p.depth, p.depth);
    else
      zero_row(bench.weight_rows + r * p.depth, p.depth);
  }
  return {bench.weight_rows, p.depth};
}

// C (+)= A B. f32's panels go by in slices that stay in the first-level cache; AMX takes the depth at once.
template <class Elem>
OFAKERN_LOCAL void product(i64 m, i64 n, i64 k, const Elem* a, i64 lda, const Panels<Elem>& b, float* c, i64 ldc,
                           bool add) {
  if (sizeof(Elem) != sizeof(float)) return gemm(m, n, k, a, lda, b, c, ldc, add);
  constexpr i64 kSlice = 128;
  for (i64 n0 = 0; n0 < n; n0 += kPanel)
    for (i64 k0 = 0; k0 < k; k0 += kSlice) {
      const Panels<Elem> slice = {b.data + n0 / kPanel * b.panel_stride + k0 * b.row_stride, b.panel_stride,
                                  b.row_stride};
      gemm(m, min_of<i64>(kPanel, n - n0), min_of(kSlice, k - k0), a + k0, lda, slice, c + n0, ldc, add || k0 > 0);
    }
}

// Scores of a block and a group of tokens, bias added.
template <class T>
OFAKERN_LOCAL void group_scores(const Problem<T>& p, const Chunk<T>& c, RowsOf<Operand<T>> weight, i64 block, i64 group,
                                const Tile& tile) {
  using Elem = Operand<T>;
  const i64 rows = p.block_rows(block);
  const Panels<Elem> columns = {c.columns + group * kGroup * p.depth, p.depth * kPanel, kPanel * Gemm<Elem>::kPair};
  const i64 tokens = c.padded_tokens(group);
  product(round_up(rows, Gemm<Elem>::kRows), tokens, p.depth, weight.data, weight.stride, columns, tile.data,
          tile.stride, false);
  if (p.bias == nullptr) return;
  for (i64 r = 0; r < rows; ++r) {
    const Vec bias = vset(to_float(p.bias[block * kBlock + r]));
    float* score = tile.data + r * tile.stride;
    for (i64 t = 0; t < tokens; t += kWidth) vstore(score + t, vadd(vload(score + t), bias));
  }
}

OFAKERN_HOT Mask word_mask(std::uint64_t word, i64 token) {
  return mask_bits(static_cast<std::uint32_t>(word >> token) & ((1ull << kWidth) - 1));
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

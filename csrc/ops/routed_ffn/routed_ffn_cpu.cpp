// Compiled once per instruction set; see core/isa.h. Expert by expert: pack its tokens, then blocks of its products.
#include "core/gemm_driver.h"
#include "core/operand.h"
#include "core/vec_stream.h"
#include "core/vec_sums.h"
#include "core/weight_gradient.h"
#include "core/with_type.h"
#include "ops/routed_ffn/routed_ffn_call.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr i64 kGroup = 64;            // tokens of a packing task, and of a tile of results
constexpr i64 kMultiple = 32;         // what every product's own multiples divide
constexpr i64 kBlockBytes = 3 << 19;  // of a block of weight, which stays in the second-level cache
constexpr i64 kFewBytes = 3 << 18;    // the same where tokens are few: more tasks, which threads share evenly
constexpr i64 kSide = 256;            // the most rows (columns) of such a block
constexpr i64 kDweightTasks = 2;      // for each thread at least: an expert's tasks are done together

// Rows or columns of a block of weight whose other side is `depth`.
template <class Elem>
OFAKERN_HOT i64 block_side(i64 depth, i64 bytes = kBlockBytes) {
  const i64 fit = bytes / (depth * static_cast<i64>(sizeof(Elem))) / kGroup * kGroup;
  return max_of(min_of(fit, kSide), kGroup);
}

// f32's panels go by in slices that stay in the first-level cache; AMX takes the depth at once.
template <class Elem>
OFAKERN_LOCAL void product(i64 m, i64 n, i64 k, const Elem* a, i64 lda, Panels<Elem> b, float* c, i64 ldc) {
  constexpr i64 kStep = sizeof(Elem) == 4 ? 256 : 1 << 30;
  for (i64 k0 = 0; k0 < k; k0 += kStep)
    gemm(m, n, min_of(kStep, k - k0), a + k0, lda, Panels<Elem>{b.data + k0 * kPanel, b.panel_stride, b.row_stride}, c,
         ldc, k0 > 0);
}

// Few tokens of f32 take sums of products along rows of x and of weight as both lie in memory: nothing is packed and no
// token padded, where the product of tiles would multiply 51 tokens as 64.
#if defined(__AVX512F__)
constexpr int kDotTokens = 4, kDotRows = 6;
#else
constexpr int kDotTokens = 2, kDotRows = 4;
#endif
constexpr i64 kDotBlock = 96;   // rows of weight of a task
constexpr i64 kDotDepth = 768;  // kDotRows so long stay in the first-level cache while the tokens go by

// sums[t * ROWS + r] (+)= x[t] . weight[r] over `depth`, whole vectors. `next`: lines that come soon.
template <int TOKENS, int ROWS>
OFAKERN_LOCAL void dot_tile(i64 depth, const float* x, i64 ldx, const float* weight, i64 ldw, const float* next,
                            float* sums, bool add) {
  constexpr int kSums = TOKENS * ROWS;
  Vec total[(kSums + kWidth - 1) / kWidth * kWidth];
#pragma GCC unroll 32
  for (Vec& sum : total) sum = vzero();
  for (i64 k = 0; k < depth; k += kWidth) {
    Vec row[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) row[r] = vload(weight + r * ldw + k);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) {
      const Vec value = vload(x + t * ldx + k);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) total[t * ROWS + r] = vfma(value, row[r], total[t * ROWS + r]);
    }
    if (k % (2 * kWidth) == 0) __builtin_prefetch(next + k / 2, 0, 2);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i += kWidth) {
    const Vec sum = vsums(total + i);
    vstore_n(sums + i, add ? vadd(sum, vload_n(sums + i, kSums - i)) : sum, kSums - i);
  }
}

// The same for `tokens` of at most TOKENS.
template <int TOKENS, int ROWS>
OFAKERN_LOCAL void dot_tokens(i64 tokens, i64 depth, const float* x, i64 ldx, const float* weight, i64 ldw,
                              const float* next, float* sums, bool add) {
  if constexpr (TOKENS > 1)
    if (tokens < TOKENS) return dot_tokens<TOKENS - 1, ROWS>(tokens, depth, x, ldx, weight, ldw, next, sums, add);
  dot_tile<TOKENS, ROWS>(depth, x, ldx, weight, ldw, next, sums, add);
}

// Their dx multiplies weights a slice at a time, whose panels the first-level cache holds while the tokens go by.
constexpr i64 kSlice = 96;  // rows of weight: no longer than one running sum
constexpr i64 kSliceColumns = 2 * kPanel;
static_assert(kSlice <= kLastChain<float> && 2 * kGroup * kSliceColumns <= kSide * kSide);

// Scratch. Arrays over an expert's tokens have `tokens` of them (the largest expert's, padded).
template <class T>
struct Room {
  using Elem = Operand<T>;
  i64 in, out;      // padded widths
  i64 tokens;       // padded
  bool few;         // tokens: reading weights is most of the work
  bool few_floats;  // f32's have ways of their own
  Elem* x_columns;  // B [in, tokens]: forward
  Elem* dy_rows;    // A [tokens, out]: dx; of few_floats in slices of kSlice columns, each [tokens, its columns]
  struct Bench {
    Elem* rows;     // a group of tokens, or a block of weight
    Elem* panels;   // a block of weight as a B operand
    float* tile;    // results
    float* turned;  // the same, transposed
    char* dweight;  // a block of dweight at work
  };
  Bench* benches;

  static Room take(const RoutedLinearCall& call, bool backward, int threads, Arena& arena) {
    Room room = {};
    room.in = round_up(call.in, kMultiple);
    room.out = round_up(call.out, kMultiple);
    room.tokens = round_up(call.most, kGroup);
    room.few = room.tokens <= 2 * kGroup;
    room.few_floats = room.few && sizeof(T) == sizeof(float);
    if (!backward) room.x_columns = arena.take<Elem>(room.in * room.tokens);
    if (backward && call.wants_dx) room.dy_rows = arena.take<Elem>(room.tokens * room.out);
    room.benches = arena.take<Bench>(threads);
    const i64 widest = max_of(room.in, room.out);
    for (int t = 0; t < threads; ++t) {
      Bench bench = {};
      bench.rows = arena.take<Elem>(max_of(kGroup * widest, room.row_block() * room.in));
      const i64 panels = max_of(room.out * room.column_block(), kSlice * kSliceColumns);
      if (backward && call.wants_dx) bench.panels = arena.take<Elem>(panels);
      bench.tile = arena.take<float>(kSide * kSide);
      bench.turned = arena.take<float>(kSide * kGroup);
      if (backward && call.wants_dweight) bench.dweight = arena.take<char>(dweight_bytes(call, threads));
      if (room.benches != nullptr) room.benches[t] = bench;
    }
    return room;
  }
  static WeightGradient<T> gradient(const RoutedLinearCall& call, const RoutedExpert& expert, int threads) {
    return {expert.count, call.out, call.in, kDweightTasks * threads};
  }
  static i64 dweight_bytes(const RoutedLinearCall& call, int threads) {
    i64 most = 0;
    for (i64 e = 0; e < call.expert_count; ++e)
      if (call.experts[e].count > 0) most = max_of(most, gradient(call, call.experts[e], threads).scratch());
    return most;
  }
  // Rows of weight of a forward task.
  i64 row_block() const { return block_side<Elem>(in, few ? kFewBytes : kBlockBytes); }
  i64 column_block() const { return block_side<Elem>(out); }  // columns of weight of a dx task
};

// One group of rows of `data`, in the order of `index`, as operands: `rows` padded with zeros.
template <class T>
OFAKERN_LOCAL void stage_rows(const void* data, i64 width, i64 padded, const std::int64_t* index, i64 first, i64 count,
                              Operand<T>* rows) {
  const T* from = static_cast<const T*>(data);
  for (i64 t = 0; t < kGroup; ++t) {
    if (t < count)
      copy_row(from + (index == nullptr ? first + t : index[first + t]) * width, width, rows + t * padded, padded);
    else
      zero_row(rows + t * padded, padded);
  }
}

// Rows [row, row + count) of weight as an A operand: in place where they lie as products want them.
template <class Elem>
OFAKERN_HOT const Elem* rows_in_place(const Elem* weight, i64 width, i64 padded, i64 row, i64 count) {
  return width == padded && count % kMultiple == 0 ? weight + row * width : nullptr;
}
template <class T>
OFAKERN_LOCAL const Operand<T>* weight_rows(const T* weight, i64 width, i64 padded, i64 row, i64 count,
                                            Operand<T>* scratch) {
  using Elem = Operand<T>;
  if constexpr (sizeof(T) == sizeof(Elem)) {
    const Elem* rows = rows_in_place(reinterpret_cast<const Elem*>(weight), width, padded, row, count);
    if (rows != nullptr) return rows;
  }
  for (i64 r = 0; r < round_up(count, kMultiple); ++r) {
    if (r < count)
      copy_row(weight + (row + r) * width, width, scratch + r * padded, padded);
    else
      zero_row(scratch + r * padded, padded);
  }
  return scratch;
}

template <class T>
struct Expert {
  using Elem = Operand<T>;
  using Bench = typename Room<T>::Bench;
  static constexpr int kPair = Gemm<Elem>::kPair;
  static constexpr i64 kStrip = sizeof(Elem) == 4 ? 96 : 32;  // rows of results
  const RoutedLinearCall& call;
  const RoutedExpert& expert;
  const Room<T>& room;

  i64 groups() const { return ceil_div(expert.count, kGroup); }
  i64 group_tokens(i64 group) const { return min_of(kGroup, expert.count - group * kGroup); }
  i64 padded_tokens(i64 group) const { return round_up(group_tokens(group), kMultiple); }
  i64 row_of(const std::int64_t* index, i64 group, i64 t) const {
    const i64 place = expert.first + group * kGroup + t;
    return index == nullptr ? place : index[place];
  }

  void pack_forward(const Bench& bench, i64 group) const {
    stage_rows<T>(call.x, call.in, room.in, call.source, expert.first + group * kGroup, group_tokens(group),
                  bench.rows);
    for (i64 t = 0; t < kGroup; t += kPanel)
      transpose_units(as_units(bench.rows + t * room.in), room.in / kPair, kPanel, room.in / kPair,
                      as_units(room.x_columns + (group * kGroup + t) * room.in), kPanel);
  }

  // Rows [block] of weight times all tokens, a strip of them at a time, which the first-level cache holds until it is
  // rounded. It is transposed, so that tokens' rows are written in runs.
  void forward_block(const Bench& bench, i64 block) const {
    const i64 row = block * room.row_block(), count = min_of(room.row_block(), call.out - row);
    const Elem* weight = weight_rows(static_cast<const T*>(expert.weight), call.in, room.in, row, count, bench.rows);
    for (i64 group = 0; group < groups(); ++group) {
      const Panels<Elem> x = {room.x_columns + group * kGroup * room.in, room.in * kPanel, kPanel * kPair};
      for (i64 r = 0; r < count; r += kStrip) {
        const i64 rows = min_of(kStrip, count - r), padded = round_up(rows, kMultiple);
        product(padded, padded_tokens(group), room.in, weight + r * room.in, room.in, x, bench.tile, kGroup);
        transpose_units(as_units(bench.tile), kGroup, padded, padded_tokens(group), as_units(bench.turned), kStrip);
        write_strip(bench.turned, group, row + r, rows);
      }
    }
  }

  void gather_forward(i64 group) const {
    stage_rows<T>(call.x, call.in, room.in, call.source, expert.first + group * kGroup, group_tokens(group),
                  room.x_columns + group * kGroup * room.in);
  }

  void forward_dots(const Bench& bench, i64 block) const {
    const i64 end = min_of((block + 1) * kDotBlock, call.out);
    i64 row = block * kDotBlock;
    for (; row + kDotRows <= end; row += kDotRows) dot_rows<kDotRows>(bench, row);
    for (; row < end; ++row) dot_rows<1>(bench, row);
  }

  // All tokens with ROWS rows of weight. While they go by, each tile of tokens asks for its share of the rows after.
  template <int ROWS>
  void dot_rows(const Bench& bench, i64 row) const {
    const float* const weight = static_cast<const float*>(expert.weight) + row * call.in;
    const i64 slices = ceil_div(call.in, kDotDepth), step = round_up(ceil_div(call.in, slices), kWidth);
    for (i64 k = 0; k < call.in; k += step) {
      const i64 depth = min_of(step, call.in - k);
      const float* const after = weight + (k + step < call.in ? k + step : ROWS * call.in);
      for (i64 t = 0, count; t < expert.count; t += count) {
        const float* const next =
            after + t * ROWS / expert.count * call.in + t * ROWS % expert.count * depth / expert.count;
        const float* const x = reinterpret_cast<const float*>(room.x_columns) + t * room.in + k;
        count = min_of<i64>(kDotTokens, expert.count - t);
        dot_tokens<kDotTokens, ROWS>(count, depth, x, room.in, weight + k, call.in, next, bench.tile + t * ROWS, k > 0);
      }
    }
    const float* const bias = static_cast<const float*>(expert.bias);
    for (i64 t = 0; t < expert.count; ++t) {
      const Vec sum = vload_n(bench.tile + t * ROWS, ROWS);
      float* const y = static_cast<float*>(call.y) + row_of(call.target, 0, t) * call.out + row;
      vstore_n(y, bias == nullptr ? sum : vadd(sum, vload_n(bias + row, ROWS)), ROWS);
    }
  }

  // Columns [row, row + count) of y, of one group of tokens.
  void write_strip(const float* turned, i64 group, i64 row, i64 count) const {
    const T* bias = static_cast<const T*>(expert.bias);
    for (i64 t = 0; t < group_tokens(group); ++t, turned += kStrip) {
      T* y = static_cast<T*>(call.y) + row_of(call.target, group, t) * call.out + row;
      for (i64 r = 0; r < count; r += kWidth) {
        const Vec sum = vload(turned + r);
        vstore_n(y + r, bias == nullptr ? sum : vadd(sum, vload_n(bias + row + r, count - r)), count - r);
      }
    }
  }

  void pack_backward(const Bench& bench, i64 group) const {
    Elem* dy = room.few_floats ? bench.rows : room.dy_rows + group * kGroup * room.out;
    stage_rows<T>(call.dy, call.out, room.out, call.target, expert.first + group * kGroup, group_tokens(group), dy);
    if (room.few_floats) slice_rows(dy, group);
  }

  // A group's staged rows of dy into the slices of all tokens.
  void slice_rows(const Elem* dy, i64 group) const {
    for (i64 o = 0; o < call.out; o += kSlice) {
      const i64 width = min_of(kSlice, call.out - o);
      Elem* const slice = room.dy_rows + o * room.tokens + group * kGroup * width;
      for (i64 t = 0; t < group_tokens(group); ++t) copy_row(dy + t * room.out + o, width, slice + t * width, width);
    }
  }

  // Columns [block] of dx for few tokens of f32. Each tile of tokens asks for its share of the slice after.
  void dx_slices(const Bench& bench, i64 block) const {
    const i64 column = block * kSliceColumns, count = min_of(kSliceColumns, call.in - column);
    float* const panels = reinterpret_cast<float*>(bench.panels);
    const i64 tiles = ceil_div(count, kPanel) * ceil_div(expert.count, kTileRows);
    for (i64 o = 0; o < call.out; o += kSlice) {
      const i64 depth = min_of(kSlice, call.out - o), after = min_of(kSlice, call.out - o - depth);
      const float* const weight = static_cast<const float*>(expert.weight) + o * call.in + column;
      for (i64 r = 0; r < depth; ++r)
        for (i64 k = 0; k < count; k += kPanel) {
          const i64 width = min_of<i64>(kPanel, count - k);
          copy_row(weight + r * call.in + k, width, panels + k * depth + r * kPanel, round_up(width, kWidth));
        }
      const float* const dy = reinterpret_cast<const float*>(room.dy_rows) + o * room.tokens;
      i64 asked = 0, done = 0;
      for (i64 k = 0; k < count; k += kPanel)
        for (i64 t = 0; t < expert.count; t += kTileRows) {
          for (const i64 share = ++done * after / tiles; asked < share; ++asked)
            prefetch_row(weight + (depth + asked) * call.in, count);
          slice_product(min_of<i64>(kTileRows, expert.count - t), min_of<i64>(kPanel, count - k), depth, dy + t * depth,
                        depth, panels + k * depth, bench.tile + t * kSliceColumns + k, kSliceColumns, o > 0, false);
        }
    }
    for (i64 t = 0; t < expert.count; ++t) {
      float* const dx = static_cast<float*>(call.dx) + row_of(call.source, 0, t) * call.in + column;
      copy_row(bench.tile + t * kSliceColumns, count, dx, count);
    }
  }

  // Columns [column, column + whole panels) of weight straight from memory, where that holds operands; returns how many
  // of its rows. All panels of a pair of rows in turn, rows further on asked for: they lie too far apart for the
  // hardware to see them coming.
  i64 pack_in_place(const Bench& bench, const T* weight, i64 width) const {
    if constexpr (sizeof(T) == sizeof(Elem)) {
      constexpr i64 kAhead = 16;
      const i64 rows = call.out / kPair * kPair;
      const Elem* row = reinterpret_cast<const Elem*>(weight);
      for (i64 o = 0; o < rows; o += kPair, row += kPair * call.in) {
        for (i64 pair = 0; pair < kPair; ++pair) prefetch_row(row + (kAhead + pair) * call.in, width);
        for (i64 k = 0; k < width; k += kPanel)
          interleave(row + k, call.in, kPair, kPanel, as_units(bench.panels + k * room.out + o * kPanel), kPanel);
      }
      return rows;
    } else {
      return 0;
    }
  }

  // Columns [block] of weight as a B operand over its rows.
  void pack_columns(const Bench& bench, i64 column, i64 count) const {
    const T* weight = static_cast<const T*>(expert.weight);
    const i64 in_panels = count / kPanel * kPanel, whole = pack_in_place(bench, weight + column, in_panels);
    for (i64 k = 0; k < round_up(count, kMultiple); k += kPanel) {
      const i64 width = min_of<i64>(kPanel, round_up(count, kMultiple) - k), valid = min_of(width, count - k);
      for (i64 o = k < in_panels ? whole : 0; o < room.out; o += kPair) {
        for (i64 pair = 0; pair < kPair; ++pair) {
          Elem* row = bench.rows + pair * kPanel;
          if (o + pair < call.out && valid > 0)
            copy_row(weight + (o + pair) * call.in + column + k, valid, row, width);
          else
            zero_row(row, width);
        }
        interleave(bench.rows, kPanel, kPair, width, as_units(bench.panels + k * room.out + o * kPanel), kPanel);
      }
    }
  }

  void dx_block(const Bench& bench, i64 block) const {
    const i64 column = block * room.column_block(), count = min_of(room.column_block(), call.in - column);
    pack_columns(bench, column, count);
    const AmxTiles tiles;
    const Panels<Elem> weight = {bench.panels, room.out * kPanel, kPanel * kPair};
    for (i64 group = 0; group < groups(); ++group) {
      product(round_up(group_tokens(group), Gemm<Elem>::kRows), round_up(count, kMultiple), room.out,
              room.dy_rows + group * kGroup * room.out, room.out, weight, bench.tile, kSide);
      for (i64 t = 0; t < group_tokens(group); ++t) {
        T* dx = static_cast<T*>(call.dx) + row_of(call.source, group, t) * call.in + column;
        for (i64 k = 0; k < count; k += kWidth) vstore_n(dx + k, vload(bench.tile + t * kSide + k), count - k);
      }
    }
  }

  // The expert's rows of a tensor `width` wide.
  TokenRows<T> rows_of(const void* data, i64 width, const std::int64_t* index) const {
    const T* rows = static_cast<const T*>(data);
    return index == nullptr ? TokenRows<T>{rows + expert.first * width, width}
                            : TokenRows<T>{rows, width, index + expert.first};
  }

  // The expert's rows of dy; as dx has staged them, where that is how they are stored.
  TokenRows<T> dy_rows() const {
    if (sizeof(T) == sizeof(Elem) && room.dy_rows != nullptr && !room.few_floats)
      return {reinterpret_cast<const T*>(room.dy_rows), room.out};
    return rows_of(call.dy, call.out, call.target);
  }

  void dweight_block(const Bench& bench, const WeightGradient<T>& gradient, i64 block) const {
    T* const dweight = static_cast<T*>(expert.dweight);
    const i64 bytes = call.expert_count * call.out * call.in * static_cast<i64>(sizeof(T));
    const bool stream = should_stream(static_cast<const T*>(dweight), call.in, bytes);
    gradient.run(block, dy_rows(), rows_of(call.x, call.in, call.source), dweight, static_cast<T*>(expert.dbias),
                 stream, bench.dweight);
    if (stream) stream_fence();
  }
};

template <class T>
OFAKERN_LOCAL void clear_gradient(const RoutedLinearCall& call, const RoutedExpert& expert) {
  if (expert.dweight != nullptr) zero_row(static_cast<T*>(expert.dweight), call.out * call.in);
  if (expert.dbias != nullptr) zero_row(static_cast<T*>(expert.dbias), call.out);
}

// The threads of `body`'s loops stay together: an expert of few tokens is done in less time than two parallel regions
// take to open.
template <class Body>
OFAKERN_LOCAL void in_team(int threads, const Body& body) {
  lead_team(threads, [](void* context) { (*static_cast<const Body*>(context))(); }, const_cast<Body*>(&body));
}

template <class T>
OFAKERN_LOCAL void forward(const RoutedLinearCall& call, void* workspace, int threads) {
  Arena arena(workspace);
  const Room<T> room = Room<T>::take(call, false, threads, arena);
  for (i64 e = 0; e < call.expert_count; ++e) {
    const Expert<T> expert = {call, call.experts[e], room};
    if (call.experts[e].count == 0) continue;
    if constexpr (sizeof(T) == sizeof(float))
      if (room.few_floats && call.in % kWidth == 0) {
        parallel_for(expert.groups(), threads, [&](i64 group, int) { expert.gather_forward(group); });
        parallel_for(ceil_div(call.out, kDotBlock), threads,
                     [&](i64 block, int thread) { expert.forward_dots(room.benches[thread], block); });
        continue;
      }
    parallel_for(expert.groups(), threads,
                 [&](i64 group, int thread) { expert.pack_forward(room.benches[thread], group); });
    parallel_for(ceil_div(call.out, room.row_block()), threads, [&](i64 block, int thread) {
      const AmxTiles tiles;
      expert.forward_block(room.benches[thread], block);
    });
  }
}

template <class T>
OFAKERN_LOCAL void backward(const RoutedLinearCall& call, void* workspace, int threads) {
  Arena arena(workspace);
  const Room<T> room = Room<T>::take(call, true, threads, arena);
  for (i64 e = 0; e < call.expert_count; ++e) {
    const Expert<T> expert = {call, call.experts[e], room};
    if (call.experts[e].count == 0) {
      clear_gradient<T>(call, call.experts[e]);
      continue;
    }
    if (call.wants_dx)
      parallel_for(expert.groups(), threads,
                   [&](i64 group, int thread) { expert.pack_backward(room.benches[thread], group); });
    const WeightGradient<T> gradient = Room<T>::gradient(call, call.experts[e], threads);
    const i64 dx_columns = room.few_floats ? kSliceColumns : room.column_block();
    const i64 dx_tasks = call.wants_dx ? ceil_div(call.in, dx_columns) : 0;
    const i64 dweight_tasks = call.wants_dweight ? gradient.blocks() : 0;
    parallel_for(dx_tasks + dweight_tasks, threads, [&](i64 task, int thread) {
      if (task < dx_tasks && room.few_floats)
        expert.dx_slices(room.benches[thread], task);
      else if (task < dx_tasks)
        expert.dx_block(room.benches[thread], task);
      else
        expert.dweight_block(room.benches[thread], gradient, task - dx_tasks);
    });
  }
}

template <class T>
OFAKERN_LOCAL i64 measure(const RoutedLinearCall& call, bool backward, int threads) {
  Arena arena(nullptr);
  Room<T>::take(call, backward, threads, arena);
  return arena.used();
}

}  // namespace

i64 routed_linear_forward_workspace(const RoutedLinearCall& call, int threads) {
  return with_type(call.dtype, [&](auto type) { return measure<decltype(type)>(call, false, threads); });
}

i64 routed_linear_backward_workspace(const RoutedLinearCall& call, int threads) {
  return with_type(call.dtype, [&](auto type) { return measure<decltype(type)>(call, true, threads); });
}

void routed_linear_forward(const RoutedLinearCall& call, void* workspace, int threads) {
  in_team(threads,
          [&] { with_type(call.dtype, [&](auto type) { forward<decltype(type)>(call, workspace, threads); }); });
}

void routed_linear_backward(const RoutedLinearCall& call, void* workspace, int threads) {
  in_team(threads,
          [&] { with_type(call.dtype, [&](auto type) { backward<decltype(type)>(call, workspace, threads); }); });
}

}  // namespace ofakern::OFAKERN_ISA

// The gradient of a linear layer's weight and bias, summed in f32:
//
//   dW[o, i] = sum_t dy[t, o] x[t, i]        db[o] = sum_t dy[t, o]
//
// Both operands lie the wrong way round in memory: their rows are what is summed over. A task is a block of dW. Tokens
// go by in chunks: x's columns are packed as panels, which the second-level cache holds; then, a strip of dW's rows at
// a time, dy's columns are transposed into the first-level cache and multiplied by all panels. A block's sums lie as
// products read and write them, a strip's panels one behind the other, and are rounded with the last chunk. What is
// packed is packed where it is read.
#pragma once

#include "core/arena.h"
#include "core/gemm_driver.h"
#include "core/operand.h"
#include "core/vec_stream.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// Rows of a tensor [N, ...] in some order: row t is data + index[t] * stride.
template <class T>
struct TokenRows {
  const T* data;
  i64 stride;
  const std::int64_t* index = nullptr;  // the identity

  const T* operator()(i64 t) const { return data + (index == nullptr ? t : index[t]) * stride; }
};

template <class T>
class WeightGradient {
  using Elem = Operand<T>;
  static constexpr i64 kPair = Gemm<Elem>::kPair, kColumns = Blocking<Elem>::kColumns;
  static constexpr i64 kStrip = sizeof(Elem) == 4 ? 48 : 32;
  static constexpr i64 kUnits = 16;              // pairs of tokens that are transposed at once
  static constexpr i64 kGroup = kUnits * kPair;  // so many tokens a chunk's depth is a multiple of
  static constexpr i64 kSide = 768;              // of a block at most
  static constexpr i64 kWritten = 256;  // columns of sums that are rounded while the first-level cache has them
  static constexpr i64 kAhead = 32;     // tokens; rows lie too far apart for the hardware to see them coming
  static constexpr i64 kLine = 64 / sizeof(Elem);  // elements
  static_assert(kGroup % Gemm<Elem>::kDepth == 0 && kStrip % kWidth == 0 && kColumns % kWidth == 0);

 public:
  // dW [out, in] of at least one token, in blocks whose number is about a multiple of `tasks`.
  WeightGradient(i64 tokens, i64 out, i64 in, i64 tasks) : tokens_(tokens), out_(out), in_(in) {
    const i64 across = ceil_div(in, kSide), blocks = round_up(across * ceil_div(out, kSide), tasks);
    columns_ = round_up(ceil_div(in, across), kColumns);
    rows_ = round_up(ceil_div(out, ceil_div(blocks, across)), kStrip);
    // Deep enough that sums seldom pass through memory, and a strip's operand takes no more than 24 KiB.
    const i64 chunk = 24 * 1024 / (kStrip * static_cast<i64>(sizeof(Elem)));
    depth_ = round_up(ceil_div(tokens, ceil_div(tokens, chunk)), kGroup);
  }

  i64 blocks() const { return ceil_div(out_, rows_) * ceil_div(in_, columns_); }
  i64 scratch() const {  // bytes of one block at work
    Arena arena(nullptr);
    Room(*this, arena);
    return arena.used();
  }

  // One block of dweight [out, in] and its rows of dbias [out] (null: not wanted), fully written, whatever the block.
  // stream: dweight's rows go past the caches (core/vec_stream.h); the caller fences.
  void run(i64 block, TokenRows<T> dy, TokenRows<T> x, T* dweight, T* dbias, bool stream, void* scratch) const {
    Arena arena(scratch);
    const Room room(*this, arena);
    const i64 across = ceil_div(in_, columns_);
    const i64 row = block / across * rows_, rows = min_of(rows_, out_ - row);
    const i64 column = block % across * columns_, columns = min_of(columns_, in_ - column);
    float* const bias = dbias != nullptr && column == 0 ? room.bias : nullptr;
    if (bias != nullptr) zero_row(bias, rows_);
    const AmxTiles tiles;
    for (i64 t = 0; t < tokens_; t += depth_) {
      const i64 end = min_of(t + depth_, tokens_), depth = round_up(end - t, kGroup);
      pack_panels(x, t, end, column, columns, room.panels);
      for (i64 o = 0; o < rows; o += kStrip) {
        const i64 valid = min_of(kStrip, rows - o);
        pack_strip(dy, t, end, row + o, valid, room, bias == nullptr ? nullptr : bias + o);
        float* const sums = room.sums + (one_chunk() ? 0 : o * columns_);
        for (i64 i = 0; i < columns; i += kColumns) {
          slice_product(kStrip, min_of(kColumns, columns - i), depth, room.strip, strip_row(),
                        room.panels + i / kColumns * panel(), sums + i * kStrip, kColumns, t > 0, false);
          if (end == tokens_ && ((i + kColumns) % kWritten == 0 || i + kColumns >= columns)) {
            const i64 begin = i / kWritten * kWritten;
            write(sums + begin * kStrip, valid, min_of(kWritten, columns - begin),
                  dweight + (row + o) * in_ + column + begin, stream);
          }
        }
      }
    }
    if (bias != nullptr) copy_row(bias, rows, dbias + row, rows);
  }

 private:
  struct Room {
    Elem* panels;           // x's columns, tokens in pairs
    Elem* strip;            // dy's columns as rows over tokens
    std::uint32_t* turned;  // pairs of dy's tokens before they are transposed
    float* sums;
    float* bias;

    Room(const WeightGradient& g, Arena& arena)
        : panels(arena.take<Elem>(g.columns_ / kColumns * g.panel())),
          strip(arena.take<Elem>(kStrip * g.strip_row())),
          turned(arena.take<std::uint32_t>(kUnits * kStrip)),
          sums(arena.take<float>((g.one_chunk() ? kStrip : g.rows_) * g.columns_)),
          bias(arena.take<float>(g.rows_)) {}
  };

  bool one_chunk() const { return depth_ >= tokens_; }
  // An odd number of lines from one to the next, so that they fall into different sets of a cache.
  i64 strip_row() const { return round_up(depth_, 2 * kLine) + kLine; }
  i64 panel() const { return round_up(depth_ * kColumns, 2 * kLine) + kLine; }

  void pack_panels(const TokenRows<T>& x, i64 first, i64 end, i64 column, i64 columns, Elem* panels) const {
    const i64 padded = first + round_up(end - first, kGroup);
    for (i64 t = first; t < padded; t += kPair) {
      for (i64 p = t + kAhead; p < min_of(t + kAhead + kPair, tokens_); ++p) prefetch_row(x(p) + column, columns);
      std::uint32_t* units = as_units(panels + (t - first) * kColumns);
      const Pair pair(x, t, end);
      for (i64 i = 0; i < columns; i += kColumns, units += panel() / kPair)
        take_units<kColumns>(pair, column + i, columns - i, units);
    }
  }

  // bias: what the columns of dy sum up to is added to it, unless it is null.
  void pack_strip(const TokenRows<T>& dy, i64 first, i64 end, i64 column, i64 valid, const Room& room,
                  float* bias) const {
    const i64 padded = first + round_up(end - first, kGroup);
    Vec sum[kStrip / kWidth] = {};
    for (i64 t = first; t < padded; t += kGroup) {
      for (i64 u = 0; u < kUnits; ++u) {
        ask_for(dy, first, end, t + u * kPair + kAhead, column);
        take_units<kStrip>(Pair(dy, t + u * kPair, end), column, valid, room.turned + u * kStrip);
      }
      transpose_units(room.turned, kStrip, kUnits, round_up(valid, kStrip), as_units(room.strip + t - first),
                      strip_row() / kPair);
      if (bias == nullptr) continue;
      for (i64 row = t; row < min_of(t + kGroup, end); ++row)
        for (i64 v = 0; v < valid; v += kWidth)
          sum[v / kWidth] = vadd(sum[v / kWidth], vload_n(dy(row) + column + v, valid - v));
    }
    if (bias == nullptr) return;
    for (i64 v = 0; v < kStrip; v += kWidth) vstore(bias + v, vadd(vload(bias + v), sum[v / kWidth]));
  }

  // A strip's columns of the tokens t to t + kPair; behind a chunk's last token the next strip's, from its first on.
  void ask_for(const TokenRows<T>& dy, i64 first, i64 end, i64 t, i64 column) const {
    if (t >= end) t -= end - first, column += kStrip;
    if (column < out_)
      for (i64 p = t; p < min_of(t + kPair, end); ++p) prefetch_row(dy(p) + column, min_of(kStrip, out_ - column));
  }

  // The rows of the tokens t to t + kPair; null from `end` on.
  struct Pair {
    const T* rows[kPair];

    Pair(const TokenRows<T>& from, i64 t, i64 end) {
      for (i64 p = 0; p < kPair; ++p) rows[p] = t + p < end ? from(t + p) : nullptr;
    }
    bool whole() const { return rows[kPair - 1] != nullptr; }
  };

  // Their columns [column, column + WIDTH), of which `valid` exist, as units; zeros elsewhere.
  template <i64 WIDTH>
  OFAKERN_HOT void take_units(const Pair& pair, i64 column, i64 valid, std::uint32_t* units) {
    if constexpr (sizeof(T) == sizeof(Elem))
      if (pair.whole() && valid >= WIDTH) {
        const T* rows[kPair];
        for (i64 p = 0; p < kPair; ++p) rows[p] = pair.rows[p] + column;
        return interleave_tokens(rows, WIDTH, units);
      }
    alignas(64) Elem staged[kPair][WIDTH];
    const Elem* ready[kPair];
    for (i64 p = 0; p < kPair; ++p) {
      if (pair.rows[p] == nullptr)
        zero_row(staged[p], WIDTH);
      else
        copy_row(pair.rows[p] + column, min_of(valid, WIDTH), staged[p], WIDTH);
      ready[p] = staged[p];
    }
    interleave_tokens(ready, WIDTH, units);
  }
  OFAKERN_HOT void interleave_tokens(const float* const* rows, i64 width, std::uint32_t* units) {
    std::memcpy(units, rows[0], static_cast<std::size_t>(width) * sizeof(float));
  }
  template <class Half>
  OFAKERN_HOT void interleave_tokens(const Half* const* rows, i64 width, std::uint32_t* units) {
    interleave_rows(rows[0], rows[1], width, units);
  }

  // A strip's rows, as soon as their sums are whole.
  void write(const float* sums, i64 rows, i64 columns, T* out, bool stream) const {
    for (i64 o = 0; o < rows; ++o, sums += kColumns, out += in_)
      for (i64 i = 0; i < columns; i += kColumns)
        for (i64 v = i; v < min_of(i + kColumns, columns); v += kWidth)
          vstore_out(out + v, vload(sums + i * kStrip + v - i), columns - v, stream);
  }

  i64 tokens_, out_, in_;
  i64 rows_, columns_;  // of a block
  i64 depth_;           // tokens of a chunk
};

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

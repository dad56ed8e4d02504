// The gradient of a linear layer's weight and bias, summed in f32:
//
//   dW[o, i] = sum_t dy[t, o] x[t, i]        db[o] = sum_t dy[t, o]
//
// Both operands lie the wrong way round in memory: their rows are what is summed over. A task is a block of dW. Tokens
// go by in chunks: x's columns are packed as panels, which the second-level cache holds; then, a strip of dW's rows at
// a time, dy's columns are transposed into the first-level cache and multiplied by all panels. A block's sums lie as
// products read and write them, a strip's panels one behind the other, until the last chunk. Nothing but that block is
// ever held, and what is packed is packed where it is read.
#pragma once

#include "core/arena.h"
#include "core/gemm_driver.h"
#include "core/operand.h"

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
  static constexpr i64 kUnits = 16;                // pairs of tokens that are transposed at once
  static constexpr i64 kGroup = kUnits * kPair;    // so many tokens a chunk's depth is a multiple of
  static constexpr i64 kSide = 768;                // of a block at most
  static constexpr i64 kAhead = 32;                // tokens; rows lie too far apart for the hardware to see them coming
  static constexpr i64 kLine = 64 / sizeof(Elem);  // elements
  static_assert(kGroup % Gemm<Elem>::kDepth == 0 && kStrip % kWidth == 0 && kColumns % kWidth == 0);

 public:
  // dW [out, in] of `tokens`, in blocks enough for all threads.
  WeightGradient(i64 tokens, i64 out, i64 in, int threads) : tokens_(tokens), out_(out), in_(in) {
    const i64 across = ceil_div(in, kSide), blocks = round_up(across * ceil_div(out, kSide), threads);
    columns_ = round_up(ceil_div(in, across), kColumns);
    rows_ = round_up(ceil_div(out, ceil_div(blocks, across)), kStrip);
    // Deep enough that sums seldom pass through memory, and a strip's operand takes no more than 24 KiB.
    const i64 chunk = 24 * 1024 / (kStrip * static_cast<i64>(sizeof(Elem)));
    depth_ = round_up(ceil_div(tokens, max_of<i64>(ceil_div(tokens, chunk), 1)), kGroup);
  }

  i64 blocks() const { return ceil_div(out_, rows_) * ceil_div(in_, columns_); }
  i64 scratch() const {  // bytes of one block at work
    Arena arena(nullptr);
    Room(*this, arena);
    return arena.used();
  }

  // One block of dweight [out, in] and its rows of dbias [out] (null: not wanted), fully written, whatever the block.
  void run(i64 block, TokenRows<T> dy, TokenRows<T> x, T* dweight, T* dbias, void* scratch) const {
    Arena arena(scratch);
    const Room room(*this, arena);
    const i64 across = ceil_div(in_, columns_);
    const i64 row = block / across * rows_, rows = min_of(rows_, out_ - row);
    const i64 column = block % across * columns_, columns = min_of(columns_, in_ - column);
    float* const bias = dbias != nullptr && column == 0 ? room.bias : nullptr;
    if (bias != nullptr) zero_row(bias, rows_);
    if (tokens_ == 0) zero_row(room.sums, rows_ * columns_);
    const AmxTiles tiles;
    for (i64 t = 0; t < tokens_; t += depth_) {
      const i64 end = min_of(t + depth_, tokens_), depth = round_up(end - t, kGroup);
      pack_panels(x, t, end, column, columns, room.panels);
      for (i64 o = 0; o < rows; o += kStrip) {
        pack_strip(dy, t, end, row + o, min_of(kStrip, rows - o), room, bias == nullptr ? nullptr : bias + o);
        for (i64 i = 0; i < columns; i += kColumns)
          slice_product(kStrip, min_of(kColumns, columns - i), depth, room.strip, strip_row(),
                        room.panels + i / kColumns * panel(), room.sums + o * columns_ + i * kStrip, kColumns, t > 0,
                        false);
      }
    }
    write(room, row, rows, column, columns, dweight);
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
          sums(arena.take<float>(g.rows_ * g.columns_)),
          bias(arena.take<float>(g.rows_)) {}
  };

  // An odd number of lines from one to the next, so that they fall into different sets of a cache.
  i64 strip_row() const { return round_up(depth_, 2 * kLine) + kLine; }
  i64 panel() const { return round_up(depth_ * kColumns, 2 * kLine) + kLine; }

  void pack_panels(const TokenRows<T>& x, i64 first, i64 end, i64 column, i64 columns, Elem* panels) const {
    const i64 padded = first + round_up(end - first, kGroup);
    for (i64 t = first; t < padded; t += kPair) {
      ask_for(x, t, column, columns);
      std::uint32_t* units = as_units(panels + (t - first) * kColumns);
      for (i64 i = 0; i < columns; i += kColumns, units += panel() / kPair)
        take_units<kColumns>(x, t, end, column + i, columns - i, units);
    }
  }

  // bias: what the columns of dy sum up to is added to it, unless it is null.
  void pack_strip(const TokenRows<T>& dy, i64 first, i64 end, i64 column, i64 valid, const Room& room,
                  float* bias) const {
    const i64 padded = first + round_up(end - first, kGroup);
    Vec sum[kStrip / kWidth] = {};
    for (i64 t = first; t < padded; t += kGroup) {
      for (i64 u = 0; u < kUnits; ++u) {
        ask_for(dy, t + u * kPair, column, valid);
        take_units<kStrip>(dy, t + u * kPair, end, column, valid, room.turned + u * kStrip);
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

  // The columns of the tokens kAhead behind t.
  void ask_for(const TokenRows<T>& from, i64 t, i64 column, i64 columns) const {
    for (i64 p = 0; p < kPair; ++p)
      if (t + p + kAhead < tokens_) prefetch_row(from(t + p + kAhead) + column, columns);
  }

  // Columns [column, column + WIDTH), of which `valid` exist, of the tokens t to t + kPair as units; zeros elsewhere.
  template <i64 WIDTH>
  OFAKERN_HOT void take_units(const TokenRows<T>& from, i64 t, i64 end, i64 column, i64 valid, std::uint32_t* units) {
    const T* rows[kPair];
    for (i64 p = 0; p < kPair; ++p) rows[p] = t + p < end ? from(t + p) + column : nullptr;
    if constexpr (sizeof(T) == sizeof(Elem))
      if (t + kPair <= end && valid >= WIDTH) return interleave_tokens(rows, WIDTH, units);
    alignas(64) Elem staged[kPair][WIDTH];
    const Elem* ready[kPair];
    for (i64 p = 0; p < kPair; ++p) {
      rows[p] == nullptr ? zero_row(staged[p], WIDTH) : copy_row(rows[p], min_of(valid, WIDTH), staged[p], WIDTH);
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

  void write(const Room& room, i64 row, i64 rows, i64 column, i64 columns, T* dweight) const {
    for (i64 o = 0; o < rows; ++o) {
      const float* sums = room.sums + o / kStrip * kStrip * columns_ + o % kStrip * kColumns;
      T* out = dweight + (row + o) * in_ + column;
      for (i64 i = 0; i < columns; i += kColumns, sums += kStrip * kColumns)
        for (i64 v = 0; v < min_of(kColumns, columns - i); v += kWidth)
          vstore_n(out + i + v, vload(sums + v), columns - i - v);
    }
  }

  i64 tokens_, out_, in_;
  i64 rows_, columns_;  // of a block
  i64 depth_;           // tokens of a chunk
};

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

// What the attention kernels share: a call's arguments as kernels take them, and its work lists.
//
// Tokens of a sample are cut into blocks. A block never holds tokens of two samples; block n of sample s has the slot
// offsets[s] / size + s + n, so that the number of slots follows from shapes alone (tokens / size + samples) and nobody
// waits for the device. Slots without tokens are empty blocks (begin == end).
#pragma once

#include <climits>

#include "core/simt.h"
#include "ops/attention/attention.h"

namespace ofakern {
namespace {

constexpr int kThreads = 128;  // four warps own rows of a block, kStream tokens of the other side pass by at a time
constexpr int kWarps = kThreads / 32;
constexpr int kStream = 32;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// A [tokens, heads, width] tensor; strides in elements.
struct Operand {
  void* data;
  std::int64_t row, head;
  int width;
};

struct Term {
  const float* table;  // null: no such term
  const int *q_coord, *k_coord;
  const int2* same;
  int rows;
};

// Keys for which a term is active: of some of the block's queries, of all of them; and those queries' coordinates.
struct TermBlock {
  int lo, hi, full_lo, full_hi, least, most;
};

// Queries [begin, end); keys that some of them see, and keys that all of them see.
struct alignas(16) QueryBlock {
  int sample, begin, end, lo, hi, full_lo, full_hi;
  unsigned seeing;  // of the block's first 32 queries: a bit for each that sees a key
  TermBlock terms[2];
};

// Keys [begin, end), the slots of query blocks that may see them (of all samples whose hull meets them), and the slot
// of their first KeyTile.
struct alignas(16) KeyBlock {
  int begin, end, first, last, tile, unused[3];
};

// kStream keys: a bit for each one that some query sees, and those keys' coordinates.
struct alignas(16) KeyTile {
  unsigned seen;
  unsigned repeats;  // bit t: a coordinate of term t stands there twice
  int least[2], most[2];
  int unused[2];
};

struct Call {
  Operand q, k, v, q_pos, k_pos;
  Term terms[2];
  const float* head_scale;
  const std::int64_t* seed;
  const int2* visible;
  const int *q_offsets, *k_offsets;
  const unsigned char* key_seen;
  const int2* k_range;
  const KeyTile* key_tiles;    // by slot of size kStream
  const unsigned char* order;  // [2][slots of kStream][kStream]: a tile's keys by rising coordinate of term t
  std::int64_t order_of_term;  // how far apart the terms' orders are
  int samples, heads, group;   // group: query heads of a key head
  float scale, score_scale;    // score_scale = scale * log2(e)
  float keep_scale;            // 1 / (1 - p)
  unsigned threshold;          // a word below it drops its probability
  bool dropout;
};

// Shared memory rows have 16-bit elements, widths padded to a step of the products, and 8 elements more: their starts
// then fall on different banks for the eight rows that a warp reads at a time.
__host__ __device__ constexpr int padded(int width) { return (width + 15) / 16 * 16; }
__host__ __device__ constexpr int pitch_of(int columns) { return columns + 8; }
__host__ __device__ __forceinline__ int depth_of(const Call& call) {
  return padded(call.q.width) + padded(call.q_pos.width);
}

__host__ __device__ __forceinline__ int terms_of(const Call& call) {
  return call.terms[1].table != nullptr ? 2 : call.terms[0].table != nullptr ? 1 : 0;
}

__host__ __device__ constexpr int slot_of(int offset, int sample, int size) { return offset / size + sample; }
constexpr std::int64_t slots_of(std::int64_t tokens, std::int64_t samples, int size) { return tokens / size + samples; }

// Hands out parts of the block's shared memory in order; on the host it counts them.
struct Carver {
  std::byte* base;
  std::size_t used = 0;
  template <class X>
  __host__ __device__ X* take(std::int64_t count) {
    X* part = reinterpret_cast<X*>(base + used);
    used += (static_cast<std::size_t>(count) * sizeof(X) + 15) / 16 * 16;
    return part;
  }
};

}  // namespace
}  // namespace ofakern

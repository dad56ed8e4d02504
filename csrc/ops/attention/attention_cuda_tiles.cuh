// What the tile kernels share: rows in shared memory, products of fragments, one tile of relative bias, dropout's bits.
//
// Four warps own kM * 16 rows of a block each (queries, or keys in the kernel of dk and dv); kStream tokens of the
// other side are a tile's columns. Scores stay in the accumulators of the products (PTX mma.m16n8k16): of tile column
// group n, element e of lane 4 g + t stands at row g + 8 (e / 2) and column 8 n + 2 t + e % 2.
#pragma once

#include "ops/attention/attention_cuda_call.cuh"

namespace ofakern {
namespace {

constexpr int kColumns = kStream / 8;  // column groups of a tile

template <int kM>
using Tile = float[kM][kColumns][4];

__device__ __forceinline__ int row_in_warp(int m, int half) { return m * 16 + half * 8 + simt::lane() / 4; }
__device__ __forceinline__ int column_of(int n) { return n * 8 + simt::lane() % 4 * 2; }

// 2^x. Results below the smallest normal number are 0.
__device__ __forceinline__ float power_of_2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

template <class T>
__device__ __forceinline__ unsigned pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 both = __floats2half2_rn(low, high);
    return reinterpret_cast<const unsigned&>(both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const unsigned&>(both);
  }
}

// ---- rows --------------------------------------------------------------------------------------------------------

// Starts copying rows of one head into shared memory: token(r) for r in [0, rows), or -1 for a row of zeros. Columns
// from the width to a step of the products are zeros.
template <class T, class Token>
__device__ __forceinline__ void copy_rows(T* to, int pitch, const Operand& from, int head, int rows, Token token) {
  const T* const base = static_cast<const T*>(from.data) + head * from.head;
  const int chunk = static_cast<int>(threadIdx.x) % 8 * 8;
#pragma unroll 2
  for (int r = static_cast<int>(threadIdx.x) / 8; r < rows; r += kThreads / 8) {
    const int row = token(r);
    const T* const source = base + (row < 0 ? 0 : row * from.row);
#pragma unroll 1
    for (int c = chunk; c < padded(from.width); c += 64)
      simt::copy_async_16(to + r * pitch + c, source + (c < from.width ? c : 0), row >= 0 && c < from.width);
  }
}

// A warp's rows, 16-bit in shared memory, to rows of one head of a contiguous result. Row r goes to first + r.
template <class T>
__device__ __forceinline__ void store_rows(T* to, const T* rows, int pitch, int width, int heads, int head, int first,
                                           int count) {
#pragma unroll 1
  for (int r = simt::lane() / 8; r < count; r += 4)
#pragma unroll 1
    for (int c = simt::lane() % 8 * 8; c < width; c += 64)
      *reinterpret_cast<uint4*>(to + ((std::int64_t{first} + r) * heads + head) * width + c) =
          *reinterpret_cast<const uint4*>(rows + r * pitch + c);
}

// A warp's accumulators to its rows in shared memory, times factor.
template <class T, int kM, int kWide>
__device__ __forceinline__ void put_rows(T* rows, int pitch, const float (&sums)[kM][kWide / 8][4], int columns,
                                         const float (&factor)[kM][2]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kWide / 8; ++n)
      if (n * 8 < columns)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<unsigned*>(rows + row_in_warp(m, half) * pitch + column_of(n)) =
              pack<T>(sums[m][n][2 * half] * factor[m][half], sums[m][n][2 * half + 1] * factor[m][half]);
}

// ---- products ----------------------------------------------------------------------------------------------------

template <class X>
__device__ __forceinline__ void clear(X& sums) {
  float* const all = reinterpret_cast<float*>(&sums);
#pragma unroll
  for (int n = 0; n < static_cast<int>(sizeof(X) / sizeof(float)); ++n) all[n] = 0.0f;
}

// tile = rows of the warp x tokens of the tile, over `depth` columns (a multiple of 16).
template <class T, int kM>
__device__ __forceinline__ void dot_products(Tile<kM>& tile, const T* own, int own_pitch, const T* stream,
                                             int stream_pitch, int depth) {
  const int lane = simt::lane();
  const T* const a_at = own + lane % 16 * own_pitch + lane / 16 * 8;
  const T* const b_at = stream + (lane / 16 * 8 + lane % 8) * stream_pitch + lane / 8 % 2 * 8;
  clear(tile);
#pragma unroll 4
  for (int k = 0; k < depth; k += 16) {
    unsigned a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) simt::load_matrix_x4(a[m], a_at + m * 16 * own_pitch + k);
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      unsigned b[4];
      simt::load_matrix_x4(b, b_at + n * 8 * stream_pitch + k);
      const unsigned first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        simt::mma_16x8x16<T>(tile[m][n], a[m], first);
        simt::mma_16x8x16<T>(tile[m][n + 1], a[m], second);
      }
    }
  }
}

// sums += tile (rounded to T) x rows of the tile's tokens, the first `columns` of kWide (a multiple of 16).
template <class T, int kM, int kWide>
__device__ __forceinline__ void add_products(float (&sums)[kM][kWide / 8][4], const Tile<kM>& tile, const T* stream,
                                             int pitch, int columns) {
  const int lane = simt::lane();
  const T* const b_at = stream + lane % 16 * pitch + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kColumns; k += 2) {
    unsigned a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int p = 0; p < 4; ++p) a[m][p] = pack<T>(tile[m][k + p / 2][p % 2 * 2], tile[m][k + p / 2][p % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < kWide / 8; n += 2) {
      if (n * 8 >= columns) break;
      unsigned b[4];
      simt::load_matrix_x4_transposed(b, b_at + k * 8 * pitch + n * 8);
      const unsigned first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        simt::mma_16x8x16<T>(sums[m][n], a[m], first);
        simt::mma_16x8x16<T>(sums[m][n + 1], a[m], second);
      }
    }
  }
}

template <int kM>
__device__ __forceinline__ void scale_tile(Tile<kM>& tile, float factor) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) tile[m][n][e] *= factor;
}

// ---- relative terms ----------------------------------------------------------------------------------------------

// How one tile meets a term. The table's rows [from, to) hold all that its pairs read.
struct TermTile {
  int from, to;
  int base, span;  // span > 0: rows [base, base + span) are in shared memory, times log2(e); 0: entries are gathered
  bool meets;      // some pair may be active
  bool whole;      // every pair of the tile is active
};

struct TermTiles {
  TermTile of[2];
  __device__ __forceinline__ TermTile at(int t) const { return t == 0 ? of[0] : of[1]; }
};

// keys [first, end) with coordinates least..most; complete: the tile has all its rows and columns.
__device__ __forceinline__ TermTile meet_term(const TermBlock& block, const Term& term, int first, int end, int least,
                                              int most, bool complete, int window) {
  TermTile tile{0, 0, 0, 0, false, false};
  if (term.table == nullptr || first >= block.hi || end <= block.lo) return tile;
  tile.meets = true;
  tile.whole = complete && first >= block.full_lo && end <= block.full_hi;
  const std::int64_t base = std::int64_t{block.least} - most, span = std::int64_t{block.most} - least - base + 1;
  tile.from = static_cast<int>(base < 0 ? 0 : base < term.rows ? base : term.rows);
  tile.to = static_cast<int>(base + span < 0 ? 0 : base + span < term.rows ? base + span : term.rows);
  if (span > 0 && span <= window && base > -window && base < term.rows)
    tile.base = static_cast<int>(base), tile.span = static_cast<int>(span);
  return tile;
}

__device__ __forceinline__ void stage_term(float* stage, const TermTile& tile, const Term& term, int head) {
  const float* const table = term.table + std::int64_t{head} * term.rows;
#pragma unroll 1
  for (int n = static_cast<int>(threadIdx.x); n < tile.span; n += kThreads) {
    const int row = tile.base + n;
    const bool there = row >= 0 && row < term.rows;
    simt::copy_async_4(stage + n, table + (there ? row : 0), there);
  }
}

// After the wait: each thread turns what it copied itself into base 2.
__device__ __forceinline__ void rescale_stage(float* stage, const TermTile& tile) {
#pragma unroll 1
  for (int n = static_cast<int>(threadIdx.x); n < tile.span; n += kThreads) stage[n] *= kLog2e;
}

__device__ __forceinline__ bool inside(int key, int lo, int length) {
  return static_cast<unsigned>(key) - static_cast<unsigned>(lo) < static_cast<unsigned>(length);
}
// Coordinates of inactive pairs may be any integers: their differences wrap and are not used.
__device__ __forceinline__ int minus(int a, int b) {
  return static_cast<int>(static_cast<unsigned>(a) - static_cast<unsigned>(b));
}

__device__ __forceinline__ float entry(const float* stage, const float* table, const TermTile& tile, int row) {
  return tile.span > 0 ? stage[row - tile.base] : table[row] * kLog2e;
}

// ---- the rows of a block of queries ------------------------------------------------------------------------------

// Of each row: the keys it sees, and for each term its coordinate and its active keys. Rows past the block's last one
// repeat its first, so that their entries can be read too.
struct QueryRows {
  int* data;
  int rows;

  __host__ __device__ void carve(Carver& carver, const Call& call, int count) {
    rows = count;
    data = carver.take<int>((2 + 3 * terms_of(call)) * rows);
  }
  __device__ __forceinline__ int& lo(int r) const { return data[r]; }
  __device__ __forceinline__ int& length(int r) const { return data[rows + r]; }
  __device__ __forceinline__ int& coord(int t, int r) const { return data[(2 + 3 * t) * rows + r]; }
  __device__ __forceinline__ int& active_lo(int t, int r) const { return data[(3 + 3 * t) * rows + r]; }
  __device__ __forceinline__ int& active_length(int t, int r) const { return data[(4 + 3 * t) * rows + r]; }

  __device__ __forceinline__ void load(const Call& call, const QueryBlock& block) const {
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x); r < rows; r += kThreads) {
      const int i = block.begin + r < block.end ? block.begin + r : block.begin;
      const int2 visible = call.visible[i];
      lo(r) = visible.x, length(r) = max(visible.y - visible.x, 0);
#pragma unroll 1
      for (int t = 0; t < terms_of(call); ++t) {
        const Term& term = call.terms[t];
        if (term.table == nullptr) continue;
        const int2 same = term.same[i];
        coord(t, r) = term.q_coord[i];
        active_lo(t, r) = max(visible.x, same.x);
        active_length(t, r) = max(min(visible.y, same.y) - max(visible.x, same.x), 0);
      }
    }
  }
};

// The keys that stream past a block of queries: tile n has keys [first(n), first(n) + kStream) in the grid of the
// block's sample, so that dropout's groups of four keys are never cut.
struct KeyRun {
  int origin, begin;  // of the sample's keys, of the first tile
  int count;
  int slot;     // of the first tile in the work list
  int lo, end;  // the hull of what the block's queries see
  bool own;     // all of it is the sample's: the work list knows it

  __device__ __forceinline__ KeyRun(const Call& call, const QueryBlock& block) {
    origin = call.k_offsets[block.sample];
    own = block.lo >= origin && block.hi <= call.k_offsets[block.sample + 1];
    lo = block.lo, end = block.hi;
    const int tile = (lo - origin) >> 5;
    begin = origin + tile * kStream;
    count = end > lo ? (end - begin + kStream - 1) / kStream : 0;
    slot = slot_of(origin, block.sample, kStream) + tile;
  }
  __device__ __forceinline__ int first(int n) const { return begin + n * kStream; }
  // Which keys of the tile are seen, and their coordinates' ranges; without them entries are gathered.
  __device__ __forceinline__ KeyTile tile(const Call& call, int n) const {
    if (own) return call.key_tiles[slot + n];
    const int key = first(n) + simt::lane();
    KeyTile found{};
    found.seen = simt::ballot(key >= lo && key < end && call.key_seen[key] != 0);
    found.least[0] = found.least[1] = INT_MIN, found.most[0] = found.most[1] = INT_MAX;
    return found;
  }
};

// Adds a term's entries, in base 2, to a tile of queries x keys. coords: of the tile's keys.
template <int kM>
__device__ __forceinline__ void add_term(Tile<kM>& score, const TermTile& tile, const float* stage, const float* table,
                                         const int* coords, const QueryRows& rows, int t, int first_row, int first) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + row_in_warp(m, half);
      const int coord = rows.coord(t, row);
      if (tile.whole && tile.span > 0) {
        const float* const entries = stage + (coord - tile.base);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const int2 key = *reinterpret_cast<const int2*>(coords + column_of(n));
          score[m][n][2 * half] += entries[-key.x];
          score[m][n][2 * half + 1] += entries[-key.y];
        }
      } else {
        const int lo = rows.active_lo(t, row), length = rows.active_length(t, row);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = column_of(n) + c;
            if (inside(first + column, lo, length))
              score[m][n][2 * half + c] += entry(stage, table, tile, minus(coord, coords[column]));
          }
        }
      }
    }
  }
}

// Scores of pairs that do not see each other become -infinity.
template <int kM>
__device__ __forceinline__ void hide(Tile<kM>& score, const QueryRows& rows, int first_row, int first) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + row_in_warp(m, half), lo = rows.lo(row), length = rows.length(row);
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (!inside(first + column_of(n) + c, lo, length)) score[m][n][2 * half + c] = -INFINITY;
    }
}

// ---- dropout -----------------------------------------------------------------------------------------------------

struct Words {
  unsigned w[4];
};

// Philox4x32-10 (Salmon et al., SC 2011).
__device__ __forceinline__ Words philox(unsigned c0, unsigned c1, unsigned c2, unsigned c3, std::uint64_t seed) {
  unsigned key0 = static_cast<unsigned>(seed), key1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * c0, b = std::uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<unsigned>(b >> 32) ^ c1 ^ key0;
    c1 = static_cast<unsigned>(b);
    c2 = static_cast<unsigned>(a >> 32) ^ c3 ^ key1;
    c3 = static_cast<unsigned>(a);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

__device__ __forceinline__ std::uint64_t dropout_key(const std::int64_t* seed) {
  return static_cast<std::uint64_t>(seed[0]) + static_cast<std::uint64_t>(seed[1]) * 0x9E3779B97F4A7C15u;
}

// A bit for each of the lane's elements of 16 rows x kStream keys, at 4 n + e: the probability survives.
// row: of the warp's first, inside its sample; key: the tile's first one, a multiple of four.
// Four neighbouring keys are one call's words; two lanes hold them, so one makes row g's and the other row g + 8's.
__device__ __forceinline__ unsigned kept_of_rows(std::uint64_t seed, unsigned threshold, int row, int key, int head,
                                                 int sample) {
  const int lane = simt::lane(), t = lane % 4, odd = t % 2;
  unsigned mine = 0;
#pragma unroll 1
  for (int n = 0; n < kColumns; ++n) {
    const Words words =
        philox(static_cast<unsigned>(key + n * 8 + t / 2 * 4) >> 2, row + lane / 4 + odd * 8, head, sample, seed);
#pragma unroll
    for (int w = 0; w < 4; ++w) mine |= (words.w[w] >= threshold ? 1u : 0u) << (4 * n + w);
  }
  const unsigned other = simt::shuffle_xor(mine, 1);
  const unsigned low = (odd ? other : mine) >> 2 * odd & 0x33333333u,
                 high = (odd ? mine : other) >> 2 * odd & 0x33333333u;
  return low | high << 2;
}

}  // namespace
}  // namespace ofakern

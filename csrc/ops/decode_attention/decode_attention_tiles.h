// Products with an operand that is read once, from memory, in the type it is stored in.
//
//   C[rows, 32] (+)= A[rows, depth] B[depth, 32]
//
// B is a panel [depth / step][32][step]: a block of keys (depth: the head's width) or 32 columns of values (depth:
// keys). At most 16 rows share it, so each load of B serves all of them. A is what OperandA says. The panel is asked
// for some way before it is needed.
#pragma once

#include "core/pack.h"
#include "ops/decode_attention/decode_attention.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr i64 kBlock = kDecodeBlock;
constexpr i64 kRowGroup = 16;  // rows that share one pass over the keys
constexpr i64 kAhead = 1024;   // bytes

// Keys whose values all tiles of rows use while they are in the L1 cache.
template <class A>
constexpr i64 kValueStep = 128;

template <class T>
struct OperandA {
  using type = float;
};
#if defined(OFAKERN_NATIVE_BF16)
template <>
struct OperandA<bf16> {
  using type = bf16;
};
#endif

template <class T>
struct Panel {
  static constexpr int kStep = 1;
};
template <>
struct Panel<bf16> {
  static constexpr int kStep = 2;
};

#if defined(__AVX512F__)
constexpr int kStreamRows = 8;  // times two vectors of accumulators
#else
constexpr int kStreamRows = 4;
#endif
constexpr int kStreamVecs = 2;

// kWidth pairs of bf16 as two vectors of f32.
OFAKERN_HOT void load_pairs(const bf16* p, Vec* even, Vec* odd) {
#if defined(__AVX512F__)
  const __m512i units = _mm512_loadu_si512(p);
  even->v = _mm512_castsi512_ps(_mm512_slli_epi32(units, 16));
  odd->v = _mm512_castsi512_ps(_mm512_and_si512(units, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
#elif defined(__AVX2__)
  const __m256i units = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even->v = _mm256_castsi256_ps(_mm256_slli_epi32(units, 16));
  odd->v = _mm256_castsi256_ps(_mm256_and_si256(units, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
#else
  for (int l = 0; l < kWidth; ++l) {
    even->v[l] = to_float(p[2 * l]);
    odd->v[l] = to_float(p[2 * l + 1]);
  }
#endif
}

template <int ROWS>
using Accumulators = Vec[ROWS][kStreamVecs];

// One step of the depth for all rows: f32, f16 and int8.
template <int ROWS, class T>
OFAKERN_HOT void stream_step(Accumulators<ROWS>& acc, const float* a, i64 lda, const T* b) {
  Vec column[kStreamVecs];
#pragma GCC unroll 2
  for (int x = 0; x < kStreamVecs; ++x) column[x] = vload_as(b + x * kWidth);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    const Vec value = vset(a[r * lda]);
#pragma GCC unroll 2
    for (int x = 0; x < kStreamVecs; ++x) acc[r][x] = vfma(value, column[x], acc[r][x]);
  }
}

// bf16, widened.
template <int ROWS>
OFAKERN_HOT void stream_step(Accumulators<ROWS>& acc, const float* a, i64 lda, const bf16* b) {
  Vec even[kStreamVecs], odd[kStreamVecs];
#pragma GCC unroll 2
  for (int x = 0; x < kStreamVecs; ++x) load_pairs(b + x * kWidth * 2, &even[x], &odd[x]);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    const Vec first = vset(a[r * lda]), second = vset(a[r * lda + 1]);
#pragma GCC unroll 2
    for (int x = 0; x < kStreamVecs; ++x) acc[r][x] = vfma(second, odd[x], vfma(first, even[x], acc[r][x]));
  }
}

#if defined(OFAKERN_NATIVE_BF16)
// bf16, multiplied as it is.
template <int ROWS>
OFAKERN_HOT void stream_step(Accumulators<ROWS>& acc, const bf16* a, i64 lda, const bf16* b) {
  Vec column[kStreamVecs];
#pragma GCC unroll 2
  for (int x = 0; x < kStreamVecs; ++x) column[x] = load_b(b + x * kWidth * 2);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    const Vec value = broadcast_a(a + r * lda);
#pragma GCC unroll 2
    for (int x = 0; x < kStreamVecs; ++x) acc[r][x] = dot(value, column[x], acc[r][x], a);
  }
}
#endif

template <int ROWS, class T, class A>
OFAKERN_LOCAL void stream_tile(i64 depth, const A* a, i64 lda, const T* b, float* c, i64 ldc, bool add) {
  constexpr int kStep = Panel<T>::kStep;
  constexpr i64 kBytes = kStreamVecs * kWidth * kStep * static_cast<i64>(sizeof(T));
  Accumulators<ROWS> acc;
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int x = 0; x < kStreamVecs; ++x) acc[r][x] = add ? vload(c + r * ldc + x * kWidth) : vzero();
  for (i64 d = 0; d < depth; d += kStep) {
    for (i64 byte = 0; byte < kBytes; byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(b) + kAhead + byte);
    stream_step<ROWS>(acc, a + d, lda, b);
    b += kBlock * kStep;
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int x = 0; x < kStreamVecs; ++x) vstore(c + r * ldc + x * kWidth, acc[r][x]);
}

template <class T, class A>
OFAKERN_LOCAL void stream_rows(i64 rows, i64 depth, const A* a, i64 lda, const T* b, float* c, i64 ldc, bool add) {
  switch (rows) {
#if defined(__AVX512F__)
    case 8:
      return stream_tile<8>(depth, a, lda, b, c, ldc, add);
    case 7:
      return stream_tile<7>(depth, a, lda, b, c, ldc, add);
    case 6:
      return stream_tile<6>(depth, a, lda, b, c, ldc, add);
    case 5:
      return stream_tile<5>(depth, a, lda, b, c, ldc, add);
#endif
    case 4:
      return stream_tile<4>(depth, a, lda, b, c, ldc, add);
    case 3:
      return stream_tile<3>(depth, a, lda, b, c, ldc, add);
    case 2:
      return stream_tile<2>(depth, a, lda, b, c, ldc, add);
    default:
      return stream_tile<1>(depth, a, lda, b, c, ldc, add);
  }
}

// Rows are cut into tiles of about the same size: five are 3 + 2 where four fit, not 4 + 1.
template <class T, class A>
OFAKERN_LOCAL void stream_panel(i64 rows, i64 depth, const A* a, i64 lda, const T* b, float* c, i64 ldc, bool add) {
  constexpr i64 kColumns = kStreamVecs * kWidth;
  const i64 tile = ceil_div(rows, ceil_div(rows, kStreamRows));
  for (i64 x = 0; x < kBlock; x += kColumns)
    for (i64 r = 0; r < rows; r += tile)
      stream_rows(min_of(tile, rows - r), depth, a + r * lda, lda, b + x * Panel<T>::kStep, c + r * ldc + x, ldc, add);
}

OFAKERN_HOT void ask_near(const char* line) { __builtin_prefetch(line, 0, 2); }

// One panel of a product, or two of the same A: memory gives more to two streams than to one.
template <class T>
struct Streams {
  const T* b[2];
  float* c[2];
};

template <int COUNT, class T, class A>
OFAKERN_LOCAL void stream(i64 rows, i64 depth, const A* a, i64 lda, Streams<T> panels, i64 ldc, bool add) {
  for (int i = 0; i < COUNT; ++i) stream_panel(rows, depth, a, lda, panels.b[i], panels.c[i], ldc, add);
}

#if defined(OFAKERN_AMX)
// One tile holds all rows: values are read once whatever the step, so C stays in its tiles.
template <>
constexpr i64 kValueStep<bf16> = 1 << 20;

// Tiles of as many rows as there are: C in 0 to 3, A in 4; B, 32 deep, in 6. One name for B: where the other hardware
// thread of a core is at work, a core has few tiles to rename to, and products that name fewer are faster.
class StreamTiles {
 public:
  ~StreamTiles() {
    if (rows_ > 0) _tile_release();
  }
  void use(i64 rows) {
    if (rows == rows_) return;
    alignas(64) struct {
      std::uint8_t palette, start_row, reserved[14];
      std::uint16_t columns[16];
      std::uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
      config.columns[t] = 64;
      config.rows[t] = static_cast<std::uint8_t>(t < 6 ? rows : 16);
    }
    // gcc's intrinsic names only the first eight bytes as read: the other stores must not be taken for dead.
    __asm__ volatile("" : : "m"(config));
    _tile_loadconfig(&config);
    rows_ = rows;
  }

 private:
  i64 rows_ = 0;
};

constexpr i64 kPairRow = kBlock * 2;  // elements of B from one pair of the depth to the next
constexpr i64 kTileAhead = 2048;      // bytes

// As many lines as a tile has, so that what is asked for and what arrives keep in step.
OFAKERN_HOT void ask_ahead(const bf16* b) {
#pragma GCC unroll 16
  for (i64 byte = 0; byte < 1024; byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(b) + kTileAhead + byte);
}

// depth is a multiple of 32.
template <int COUNT>
OFAKERN_LOCAL void stream(i64, i64 depth, const bf16* a, i64 lda, Streams<bf16> panels, i64 ldc, bool add) {
  const bf16 *b = panels.b[0], *second = panels.b[1];
  float *c = panels.c[0], *d = panels.c[1];
  if (add) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + 16, ldc * 4);
    if (COUNT == 2) _tile_loadd(2, d, ldc * 4);
    if (COUNT == 2) _tile_loadd(3, d + 16, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (COUNT == 2) _tile_zero(2);
    if (COUNT == 2) _tile_zero(3);
  }
  for (i64 k = 0; k < depth; k += 32, b += 16 * kPairRow, second += 16 * kPairRow) {
    _tile_loadd(4, a + k, lda * 2);
    ask_ahead(b);
    _tile_loadd(6, b, kPairRow * 2);
    _tile_dpbf16ps(0, 4, 6);
    if (COUNT == 2) {
      ask_ahead(second);
      _tile_loadd(6, second, kPairRow * 2);
      _tile_dpbf16ps(2, 4, 6);
    }
    ask_ahead(b + 512);
    _tile_loadd(6, b + 32, kPairRow * 2);
    _tile_dpbf16ps(1, 4, 6);
    if (COUNT == 2) {
      ask_ahead(second + 512);
      _tile_loadd(6, second + 32, kPairRow * 2);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16, ldc * 4);
  if (COUNT == 2) _tile_stored(2, d, ldc * 4);
  if (COUNT == 2) _tile_stored(3, d + 16, ldc * 4);
}
#else
// Nothing to configure without AMX.
struct StreamTiles {
  void use(i64) {}
};
#endif

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

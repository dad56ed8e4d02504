// Block matrix products on packed operands: C[M, N] (+)= A[M, K] B[K, N], accumulated in f32.
//
// `Elem` is what the operands are packed as: f32, or bf16 where the ISA multiplies it natively (VDPBF16PS, AMX).
// A is row-major, K contiguous. B is cut into panels of kPanel columns; within a panel, `kPair<Elem>` consecutive k of
// one column stand together (1 for f32, 2 for bf16), so a panel row is kPanel * kPair elements. Padding is the
// caller's: K is a multiple of kDepth<Elem>, M of kRows<Elem>, N of kColumns<Elem>, and pads of A or B hold zeros.
// What a product is added to need not stand where the sum goes (Onto).
#pragma once

#include "core/vec.h"

#if defined(__AMX_BF16__)
#define OFAKERN_AMX 1
#endif
#if defined(__AVX512BF16__)
#define OFAKERN_NATIVE_BF16 1
#endif

namespace ofakern::OFAKERN_ISA {
namespace {

// Register blocking: kTileRows x kTileVecs accumulators, one vector row of B and one broadcast must fit the register
// file.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVecs = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVecs = 2;
#else
constexpr int kTileRows = 4, kTileVecs = 2;
#endif
constexpr int kPanel = kTileVecs * kWidth;

template <class Elem>
struct Gemm;

template <>
struct Gemm<float> {
  static constexpr int kPair = 1, kDepth = 1, kRows = 1, kColumns = kWidth;
};
#if defined(OFAKERN_AMX)
template <>
struct Gemm<bf16> {
  static constexpr int kPair = 2, kDepth = 32, kRows = 16, kColumns = 16;
};
#elif defined(OFAKERN_NATIVE_BF16)
template <>
struct Gemm<bf16> {
  static constexpr int kPair = 2, kDepth = 2, kRows = 1, kColumns = kWidth;
};
#endif

// B operand: element (k, n) of panel p starts at data + p * panel_stride + (k / kPair) * row_stride + ...
template <class Elem>
struct Panels {
  const Elem* data;
  i64 panel_stride;  // elements from one panel to the next
  i64 row_stride;    // elements from one k group to the next
};

// What a product is added to: nothing, C itself, or another block of C's shape.
struct Onto {
  const float* data = nullptr;
  i64 stride = 0;  // elements from one row to the next

  Onto from(i64 row, i64 column) const { return data == nullptr ? *this : Onto{data + row * stride + column, stride}; }
};
OFAKERN_HOT Onto onto_itself(bool add, const float* c, i64 ldc) { return add ? Onto{c, ldc} : Onto{}; }

OFAKERN_HOT Vec broadcast_a(const float* a) { return vset(*a); }
OFAKERN_HOT Vec load_b(const float* b) { return vload(b); }
OFAKERN_HOT Vec dot(Vec a, Vec b, Vec c, const float*) { return vfma(a, b, c); }
#if defined(OFAKERN_NATIVE_BF16)
OFAKERN_HOT Vec broadcast_a(const bf16* a) {
  std::int32_t pair;
  std::memcpy(&pair, a, sizeof pair);
  return {_mm512_castsi512_ps(_mm512_set1_epi32(pair))};
}
OFAKERN_HOT Vec load_b(const bf16* b) { return {_mm512_loadu_ps(b)}; }
OFAKERN_HOT Vec dot(Vec a, Vec b, Vec c, const bf16*) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#endif

// Groups that one running sum takes. A sum of n terms one after the other is wrong by about n roundings of its usual
// size: long float32 products are sums of shorter ones. In half precision the result's own rounding is far larger.
template <class Elem>
constexpr i64 kChain = sizeof(Elem) == 4 ? 96 : i64{1} << 62;
// The last sum may be a little longer: a register tile's way through memory and back takes as long as three groups.
template <class Elem>
constexpr i64 kLastChain = sizeof(Elem) == 4 ? 128 : i64{1} << 62;

// One register tile of ROWS x VECS vectors; the whole K runs through it.
template <class Elem, int ROWS, int VECS>
OFAKERN_LOCAL void gemm_tile(i64 groups, const Elem* a, i64 lda, const Elem* b, i64 b_row, float* c, i64 ldc,
                             Onto onto) {
  constexpr int kPair = Gemm<Elem>::kPair;
  i64 g = 0;
  do {
    const i64 end = groups - g <= kLastChain<Elem> ? groups : g + kChain<Elem>;
    const Onto start = g > 0 ? Onto{c, ldc} : onto;
    Vec acc[ROWS][VECS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int x = 0; x < VECS; ++x) acc[r][x] = vzero();
    for (; g < end; ++g) {
      Vec column[VECS];
#pragma GCC unroll 8
      for (int x = 0; x < VECS; ++x) column[x] = load_b(b + g * b_row + x * kWidth * kPair);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const Vec value = broadcast_a(a + r * lda + g * kPair);
#pragma GCC unroll 8
        for (int x = 0; x < VECS; ++x) acc[r][x] = dot(value, column[x], acc[r][x], a);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int x = 0; x < VECS; ++x) {
        float* const out = c + r * ldc + x * kWidth;
        vstore(out,
               start.data != nullptr ? vadd(vload(start.data + r * start.stride + x * kWidth), acc[r][x]) : acc[r][x]);
      }
  } while (g < groups);
}

template <class Elem, int ROWS>
OFAKERN_LOCAL void gemm_tile_vecs(int vecs, i64 groups, const Elem* a, i64 lda, const Elem* b, i64 b_row, float* c,
                                  i64 ldc, Onto onto) {
  switch (vecs) {
    case 1:
      return gemm_tile<Elem, ROWS, 1>(groups, a, lda, b, b_row, c, ldc, onto);
    case 2:
      return gemm_tile<Elem, ROWS, 2>(groups, a, lda, b, b_row, c, ldc, onto);
#if defined(__AVX512F__)
    case 3:
      return gemm_tile<Elem, ROWS, 3>(groups, a, lda, b, b_row, c, ldc, onto);
    default:
      return gemm_tile<Elem, ROWS, 4>(groups, a, lda, b, b_row, c, ldc, onto);
#endif
  }
}

template <class Elem>
OFAKERN_LOCAL void gemm_vector(i64 m, i64 n, i64 k, const Elem* a, i64 lda, Panels<Elem> b, float* c, i64 ldc,
                               Onto onto) {
  const i64 groups = k / Gemm<Elem>::kPair;
  for (i64 n0 = 0; n0 < n; n0 += kPanel) {
    const int vecs = static_cast<int>(min_of<i64>(kPanel, n - n0) / kWidth);
    const Elem* panel = b.data + n0 / kPanel * b.panel_stride;
    i64 m0 = 0;
    for (; m0 + kTileRows <= m; m0 += kTileRows)
      gemm_tile_vecs<Elem, kTileRows>(vecs, groups, a + m0 * lda, lda, panel, b.row_stride, c + m0 * ldc + n0, ldc,
                                      onto.from(m0, n0));
    for (; m0 + 2 <= m; m0 += 2)
      gemm_tile_vecs<Elem, 2>(vecs, groups, a + m0 * lda, lda, panel, b.row_stride, c + m0 * ldc + n0, ldc,
                              onto.from(m0, n0));
    if (m0 < m)
      gemm_tile_vecs<Elem, 1>(vecs, groups, a + m0 * lda, lda, panel, b.row_stride, c + m0 * ldc + n0, ldc,
                              onto.from(m0, n0));
  }
}

#if defined(OFAKERN_AMX)

// Five tiles of 16 rows x 64 bytes: C 0..1, A 2..3, B 4. Where there are fewer rows than two tiles hold, `upper` and
// `lower` of them: what A and C lack is neither loaded nor multiplied.
//
// Not all eight, two columns of C at a time, though that loads a third less: a core whose other hardware thread is at
// work has few tiles to rename these to. With eight in use every load waits for a product (36 ns for one product of two
// tiles, of which 18 are left with five); on a core of its own five cost a tenth.
struct AmxTiles {
  explicit AmxTiles(i64 upper = 16, i64 lower = 16) {
    alignas(64) struct {
      std::uint8_t palette, start_row, reserved[14];
      std::uint16_t columns[16];
      std::uint8_t rows[16];
    } config = {};
    config.palette = 1;
    const i64 rows[] = {upper, lower, upper, lower, 16};
    for (int t = 0; t < 5; ++t) {
      config.columns[t] = 64;
      config.rows[t] = static_cast<std::uint8_t>(rows[t]);
    }
    // gcc's intrinsic names only the first eight bytes as read: the other stores must not be taken for dead.
    __asm__ volatile("" : : "m"(config));
    _tile_loadconfig(&config);
  }
  ~AmxTiles() { _tile_release(); }
};

// How far ahead a B that comes from memory is asked for: the hardware sees no further than the end of a page.
constexpr i64 kStreamAhead = 4 * 1024;

// A 16*ROWS x 16 block of C (ROWS in {1, 2}). STREAM: B is read once, from memory, and goes on behind this block's end
// (it is asked for past that, which harms nothing where it does not).
template <int ROWS, bool STREAM = false>
OFAKERN_LOCAL void amx_block(i64 k, const bf16* a, i64 lda, const bf16* b, i64 b_row, float* c, i64 ldc, Onto onto) {
  const i64 c_bytes = ldc * 4, a_bytes = lda * 2, b_bytes = b_row * 2;
  if (onto.data != nullptr) {
    _tile_loadd(0, onto.data, onto.stride * 4);
    if (ROWS == 2) _tile_loadd(1, onto.data + 16 * onto.stride, onto.stride * 4);
  } else {
    _tile_zero(0);
    if (ROWS == 2) _tile_zero(1);
  }
  for (i64 k0 = 0; k0 < k; k0 += 32) {
    const bf16* b0 = b + k0 / 2 * b_row;
    if (STREAM)
      for (i64 byte = 0; byte < 16 * b_bytes; byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(b0) + kStreamAhead + byte, 0, 2);
    _tile_loadd(4, b0, b_bytes);
    _tile_loadd(2, a + k0, a_bytes);
    _tile_dpbf16ps(0, 2, 4);
    if (ROWS == 2) {
      _tile_loadd(3, a + 16 * lda + k0, a_bytes);
      _tile_dpbf16ps(1, 3, 4);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (ROWS == 2) _tile_stored(1, c + 16 * ldc, c_bytes);
}

OFAKERN_LOCAL void gemm_amx(i64 m, i64 n, i64 k, const bf16* a, i64 lda, Panels<bf16> b, float* c, i64 ldc, Onto onto) {
  for (i64 n0 = 0; n0 < n; n0 += 16) {
    const bf16* columns = b.data + n0 / kPanel * b.panel_stride + n0 % kPanel * 2;
    i64 m0 = 0;
    for (; m0 + 32 <= m; m0 += 32)
      amx_block<2>(k, a + m0 * lda, lda, columns, b.row_stride, c + m0 * ldc + n0, ldc, onto.from(m0, n0));
    if (m0 < m) amx_block<1>(k, a + m0 * lda, lda, columns, b.row_stride, c + m0 * ldc + n0, ldc, onto.from(m0, n0));
  }
}

OFAKERN_HOT void gemm(i64 m, i64 n, i64 k, const bf16* a, i64 lda, Panels<bf16> b, float* c, i64 ldc, Onto onto) {
  gemm_amx(m, n, k, a, lda, b, c, ldc, onto);
}
#else
// Nothing to configure without AMX.
struct AmxTiles {
  explicit AmxTiles(i64 = 16, i64 = 16) {}
  ~AmxTiles() {}
};
#if defined(OFAKERN_NATIVE_BF16)
OFAKERN_HOT void gemm(i64 m, i64 n, i64 k, const bf16* a, i64 lda, Panels<bf16> b, float* c, i64 ldc, Onto onto) {
  gemm_vector(m, n, k, a, lda, b, c, ldc, onto);
}
#endif
#endif

OFAKERN_HOT void gemm(i64 m, i64 n, i64 k, const float* a, i64 lda, Panels<float> b, float* c, i64 ldc, Onto onto) {
  gemm_vector(m, n, k, a, lda, b, c, ldc, onto);
}

// C = A B, or C += A B.
template <class Elem>
OFAKERN_HOT void gemm(i64 m, i64 n, i64 k, const Elem* a, i64 lda, Panels<Elem> b, float* c, i64 ldc, bool add) {
  gemm(m, n, k, a, lda, b, c, ldc, onto_itself(add, c, ldc));
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

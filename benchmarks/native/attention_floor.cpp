// What attention's forward pass is made of, each part alone on one core with its operands in the first-level cache:
// the least that its instructions take. `python -m benchmarks.attention_floor` compiles and explains it.
//
// Prints "part nanoseconds" lines; nanoseconds are per vector of 16 scores, the least of many runs.
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "ops/attention/attention_tiles.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr i64 kColumns = 64;  // width of v
constexpr float kReference = 3.0f, kScale = 0.125f;

template <class Elem>
struct Step {
  static constexpr i64 kRows = Tile<Elem>::kStep, kKeys = Tile<Elem>::kKeys, kVectors = kRows * kKeys / 16;
  // Probabilities take the place of their scores, as in the kernel.
  static constexpr i64 kRowStride = kKeys * static_cast<i64>(sizeof(float) / sizeof(Elem));

  i64 depth;
  bool term;
  Elem *queries, *keys, *values;
  float *scores[3], *output, *table, *sums;

  static Step make(i64 depth, bool term) {
    Step s = {};
    s.depth = depth;
    s.term = term;
    s.queries = filled<Elem>(kRows * depth);
    s.keys = filled<Elem>(kKeys * depth);
    s.values = filled<Elem>(kKeys * kColumns);
    for (float*& scores : s.scores) scores = filled<float>(kRows * kKeys);
    s.output = filled<float>(kRows * kColumns);
    s.table = filled<float>(kRows + kKeys);
    s.sums = filled<float>(kRows * kWidth);
    return s;
  }

  template <class T>
  static T* filled(i64 count) {
    T* data = static_cast<T*>(std::aligned_alloc(4096, static_cast<std::size_t>(round_up(count * sizeof(T), 4096))));
    for (i64 i = 0; i < count; ++i) from_float(static_cast<float>(i % 37) / 37.0f - 0.5f, data + i);
    return data;
  }

  Elem* probabilities(int buffer) const { return reinterpret_cast<Elem*>(scores[buffer]); }
  Panels<Elem> key_panels() const { return {keys, depth * kPanel, kPanel * Gemm<Elem>::kPair}; }
  Panels<Elem> value_panels() const { return {values, kKeys * kPanel, kPanel * Gemm<Elem>::kPair}; }

  void multiply_keys(int buffer) const {
    gemm(kRows, kKeys, depth, queries, depth, key_panels(), scores[buffer], kKeys, false);
  }
  void multiply_values(int buffer) const {
    gemm(kRows, kColumns, kKeys, probabilities(buffer), kRowStride, value_panels(), output, kColumns, true);
  }

  // Scores of row r become probabilities; between(v) runs before vector v.
  template <bool TERM, class Between>
  void softmax_row(int buffer, i64 r, const Between& between) const {
    const Vec scale = vset(kScale), less = vset(-kReference);
    const float *products = scores[buffer] + r * kKeys, *entries = table + (kRows - r);
    Elem* out = probabilities(buffer) + r * kRowStride;
    Vec total = vzero();
    for (i64 x = 0; x < kKeys; x += kWidth) {
      between(r * (kKeys / kWidth) + x / kWidth);
      Vec score = vfma(vload(products + x), scale, less);
      if (TERM) score = vadd(score, vload(entries + x));
      const Vec probability = vexp2_for(score, out);
      total = vadd(total, probability);
      vstore_as(out + x, probability);
    }
    vstore(sums + r * kWidth, vadd(vload(sums + r * kWidth), total));
  }
  template <class Between>
  void softmax(int buffer, const Between& between) const {
    for (i64 r = 0; r < kRows; ++r)
      term ? softmax_row<true>(buffer, r, between) : softmax_row<false>(buffer, r, between);
  }
  void softmax(int buffer) const {
    softmax(buffer, [](i64) {});
  }
};

// The least nanoseconds per vector of `body`, which goes through one step.
template <class Body>
double least(i64 vectors, const Body& body) {
  using Clock = std::chrono::steady_clock;
  constexpr int kSteps = 200, kRuns = 60;
  double best = 1e9;
  for (int run = 0; run < kRuns; ++run) {
    const Clock::time_point start = Clock::now();
    for (int n = 0; n < kSteps; ++n) {
      body(n);
      __asm__ volatile("" ::: "memory");
    }
    const double taken = std::chrono::duration<double, std::nano>(Clock::now() - start).count();
    best = best < taken / kSteps ? best : taken / kSteps;
  }
  return best / static_cast<double>(vectors);
}

#if defined(OFAKERN_AMX)
// Pair n of tile products of a step's work: first q.k into one buffer, then p.v from another.
OFAKERN_HOT void tile_pair(const Step<bf16>& s, i64 n, int into, int from) {
  const i64 steps = s.depth / 32, scores = Step<bf16>::kKeys / 16 * steps;
  const bool first = n < scores;
  const i64 length = first ? steps : Step<bf16>::kKeys / 32, at = first ? n : n - scores;
  const i64 column = at / length * 16, k = at % length * 32;
  const Panels<bf16> panels = first ? s.key_panels() : s.value_panels();
  const bf16* b = panels.data + column / kPanel * panels.panel_stride + column % kPanel * 2 + k / 2 * panels.row_stride;
  const bf16* a = (first ? s.queries : s.probabilities(from)) + k;
  const i64 a_row = first ? s.depth : Step<bf16>::kRowStride, c_row = first ? Step<bf16>::kKeys : kColumns;
  float* c = (first ? s.scores[into] : s.output) + column;
  if (k == 0 && first) {
    _tile_zero(0);
    _tile_zero(1);
  } else if (k == 0) {
    _tile_loadd(0, c, c_row * 4);
    _tile_loadd(1, c + 16 * c_row, c_row * 4);
  }
  _tile_loadd(4, b, panels.row_stride * 2);
  _tile_loadd(2, a, a_row * 2);
  _tile_dpbf16ps(0, 2, 4);
  _tile_loadd(3, a + 16 * a_row, a_row * 2);
  _tile_dpbf16ps(1, 3, 4);
  if (k + 32 == length * 32) {
    _tile_stored(0, c, c_row * 4);
    _tile_stored(1, c + 16 * c_row, c_row * 4);
  }
}

// A step's softmax with the tile products of its neighbours spread evenly between its vectors.
double interleaved(const Step<bf16>& s) {
  constexpr i64 kVectors = Step<bf16>::kVectors;
  const i64 pairs = Step<bf16>::kKeys / 16 * (s.depth / 32) + kColumns / 16 * (Step<bf16>::kKeys / 32);
  return least(kVectors, [&](int n) {
    i64 done = 0;
    s.softmax(n % 3, [&](i64 vector) {
      for (; done * kVectors < (vector + 1) * pairs; ++done) tile_pair(s, done, (n + 1) % 3, (n + 2) % 3);
    });
  });
}
#endif

template <class Elem>
void report(const char* name, i64 depth, bool term) {
  const Step<Elem> s = Step<Elem>::make(depth, term);
  constexpr i64 kVectors = Step<Elem>::kVectors;
  const auto tell = [&](const char* part, double time) { std::printf("%s.%ld.%s %.3f\n", name, depth, part, time); };
  tell("scores", least(kVectors, [&](int) { s.multiply_keys(0); }));
  tell("softmax", least(kVectors, [&](int) { s.softmax(0); }));
  tell("values", least(kVectors, [&](int) { s.multiply_values(0); }));
  tell("sequence", least(kVectors, [&](int) {
         s.multiply_keys(0);
         s.softmax(0);
         s.multiply_values(0);
       }));
#if defined(OFAKERN_AMX)
  if constexpr (sizeof(Elem) == 2) tell("interleaved", interleaved(s));
#endif
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

int main() {
  using namespace ofakern::OFAKERN_ISA;
#if defined(OFAKERN_AMX)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM: Linux hands tiles out on request
  if (syscall(SYS_arch_prctl, kRequest, kTileData) != 0) return 1;
#endif
  const AmxTiles tiles;
  report<float>("f32", 64, false);
  report<float>("f32", 128, true);
#if defined(OFAKERN_NATIVE_BF16)
  report<bf16>("bf16", 64, false);
  report<bf16>("bf16", 128, true);
#endif
}

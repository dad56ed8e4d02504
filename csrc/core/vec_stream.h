// Stores that go past the caches, for results that no cache could keep until they are read: a cached store first reads
// the line that it overwrites, which is half as much traffic again.
#pragma once

#include "core/vec.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// Rows of `width` elements at `base`, `bytes` in all: can and should they be streamed?
template <class T>
OFAKERN_HOT bool should_stream(const T* base, i64 width, i64 bytes) {
#if defined(__AVX2__)
  constexpr i64 kBeyondCaches = i64{16} << 20;
  return bytes >= kBeyondCaches && reinterpret_cast<std::uintptr_t>(base) % 64 == 0 &&
         width * static_cast<i64>(sizeof(T)) % 64 == 0;
#else
  (void)base, (void)width, (void)bytes;
  return false;
#endif
}

// A whole vector at an address that should_stream has accepted.
#if defined(__AVX512F__)
OFAKERN_HOT void vstream(float* p, Vec x) { _mm512_stream_ps(p, x.v); }
OFAKERN_HOT void vstream(bf16* p, Vec x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x)); }
OFAKERN_HOT void vstream(f16* p, Vec x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
OFAKERN_HOT void vstream(float* p, Vec x) { _mm256_stream_ps(p, x.v); }
template <class T>
OFAKERN_HOT void vstream(T* p, Vec x) {
  alignas(16) T narrow[kWidth];
  vstore_as(narrow, x);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_load_si128(reinterpret_cast<const __m128i*>(narrow)));
}
#else
template <class T>
OFAKERN_HOT void vstream(T* p, Vec x) {
  vstore_as(p, x);
}
#endif

// Streamed stores are ordered before whatever follows: at the end of every task that streams.
OFAKERN_HOT void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// n <= kWidth elements; fewer only when nothing is streamed.
template <class T>
OFAKERN_HOT void vstore_out(T* p, Vec x, i64 n, bool stream) {
  if (stream)
    vstream(p, x);
  else
    vstore_n(p, x, n);
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

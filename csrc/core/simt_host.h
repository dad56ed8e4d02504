// The emulator's side of simt.h: kernels run on the host, so that they can be executed, not only compiled, without a
// GPU.
//
// Blocks run one after the other, in an order shuffled from a seed. A block's threads are fibers: one runs until it
// reaches a synchronisation, then another one that could run is drawn. A missing barrier therefore shows as a wrong
// result under some seed; one that not all threads reach is an error with the kernel's name. Shared memory starts as
// NaN bytes and has guards behind it. Asynchronous copies take effect at the wait and spoil their target until then.
// Sums are computed as the PTX manual lays fragments out, products exact and sums in float: a GPU's differ by
// roundings. Nothing here says anything about speed.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "core/launch.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

// One launch runs at a time.
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};

// CUDA's functions that the host has not.
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((std::uint64_t{a} * b) >> 32); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
using std::max;
using std::min;

// The key is this place in this instantiation of the function around it.
#define OFAKERN_SHARED(type, name, count) \
  static char ofakern_key_##name;         \
  type(&name)[count] =                    \
      *static_cast<type(*)[count]>(::ofakern::simt::host::shared_array(&ofakern_key_##name, sizeof(type) * (count)))

namespace ofakern::simt {
namespace host {

// Where in the source a thread waits.
struct Site {
  const char* what;
  const char* file;
  int line;
};

void meet_block(const Site& site);
// Every lane gives a pointer; the last one that arrives does `work` on all 32 of them.
void meet_warp(const Site& site, void* mine, void (*work)(void* const* lanes));
void* shared_array(const void* key, std::size_t bytes);
std::byte* dynamic_memory();
int thread_index();
void copy_later(const Site& site, void* shared, const void* global, std::size_t bytes, bool valid);
void close_copies();
void finish_copies(int groups_left);
void load_matrices(const Site& site, unsigned* r, int count, const void* shared_row, bool transposed);
void multiply_bf16(const Site& site, float* d, const unsigned* a, const unsigned* b);
void multiply_f16(const Site& site, float* d, const unsigned* a, const unsigned* b);

// body(arguments) is one thread.
void run(const char* text, const Grid& grid, void (*body)(void*), void* arguments);
// For tests: the order of everything, and what the next launch fails with (a cudaError_t, as a GPU's would).
void set_seed(std::uint64_t seed);
void fail_next_launch(int status);

template <class T>
T exchange(const Site& site, T v, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what a shuffle moves has 32 or 64 bits");
  struct Turn {
    T value, result;
    int source;
  } turn{v, v, source};
  meet_warp(site, &turn, [](void* const* lanes) {
    for (int l = 0; l < 32; ++l) {
      Turn& mine = *static_cast<Turn*>(lanes[l]);
      mine.result = static_cast<const Turn*>(lanes[mine.source])->value;
    }
  });
  return turn.result;
}

// Pairs of lanes, then pairs of pairs: the order in which a GPU's lanes combine.
template <class Combine>
float reduce(const Site& site, float v) {
  meet_warp(site, &v, [](void* const* lanes) {
    float all[32], next[32];
    for (int l = 0; l < 32; ++l) all[l] = *static_cast<const float*>(lanes[l]);
    for (int mask = 16; mask > 0; mask /= 2) {
      for (int l = 0; l < 32; ++l) next[l] = Combine()(all[l], all[l ^ mask]);
      std::memcpy(all, next, sizeof(all));
    }
    for (int l = 0; l < 32; ++l) *static_cast<float*>(lanes[l]) = all[l];
  });
  return v;
}

struct Add {
  float operator()(float a, float b) const { return a + b; }
};
struct Max {
  float operator()(float a, float b) const { return std::fmax(a, b); }
};

}  // namespace host

#define OFAKERN_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline std::byte* dynamic_shared() { return host::dynamic_memory(); }
inline void sync_block(OFAKERN_AT) { host::meet_block({"sync_block", file, line}); }
inline void sync_warp(OFAKERN_AT) { host::meet_warp({"sync_warp", file, line}, nullptr, nullptr); }
inline void thread_fence() {}
inline int lane() { return host::thread_index() & 31; }
inline int warp() { return host::thread_index() >> 5; }

template <class T>
T shuffle(T v, int source, OFAKERN_AT) {
  return host::exchange({"shuffle", file, line}, v, source & 31);
}
template <class T>
T shuffle_xor(T v, int mask, OFAKERN_AT) {
  return host::exchange({"shuffle_xor", file, line}, v, (lane() ^ mask) & 31);
}
template <class T>
T shuffle_up(T v, unsigned n, OFAKERN_AT) {
  const int source = lane() - static_cast<int>(n);
  return host::exchange({"shuffle_up", file, line}, v, source < 0 ? lane() : source);
}
template <class T>
T shuffle_down(T v, unsigned n, OFAKERN_AT) {
  const int source = lane() + static_cast<int>(n);
  return host::exchange({"shuffle_down", file, line}, v, source > 31 ? lane() : source);
}
inline unsigned ballot(bool p, OFAKERN_AT) {
  unsigned votes = p ? 1u : 0u;
  host::meet_warp({"ballot, any or all", file, line}, &votes, [](void* const* lanes) {
    unsigned all = 0;
    for (int l = 0; l < 32; ++l) all |= *static_cast<const unsigned*>(lanes[l]) << l;
    for (int l = 0; l < 32; ++l) *static_cast<unsigned*>(lanes[l]) = all;
  });
  return votes;
}
inline bool any(bool p, OFAKERN_AT) { return ballot(p, file, line) != 0; }
inline bool all(bool p, OFAKERN_AT) { return ballot(p, file, line) == 0xFFFFFFFFu; }
inline float warp_sum(float v, OFAKERN_AT) { return host::reduce<host::Add>({"warp_sum", file, line}, v); }
inline float warp_max(float v, OFAKERN_AT) { return host::reduce<host::Max>({"warp_max", file, line}, v); }

template <class T>
T atomic_add(T* to, T v) {
  static_assert(std::is_integral_v<T>);
  const T before = *to;
  *to = static_cast<T>(before + v);
  return before;
}
template <class T>
T atomic_or(T* to, T v) {
  static_assert(std::is_integral_v<T>);
  const T before = *to;
  *to = static_cast<T>(before | v);
  return before;
}
template <class T>
T atomic_min(T* to, T v) {
  static_assert(std::is_integral_v<T>);
  const T before = *to;
  *to = std::min(before, v);
  return before;
}
template <class T>
T atomic_max(T* to, T v) {
  static_assert(std::is_integral_v<T>);
  const T before = *to;
  *to = std::max(before, v);
  return before;
}

template <class T>
void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], OFAKERN_AT) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  const host::Site site{"mma_16x8x16", file, line};
  std::is_same_v<T, __half> ? host::multiply_f16(site, d, a, b) : host::multiply_bf16(site, d, a, b);
}
inline void load_matrix_x4(unsigned (&r)[4], const void* shared_row, OFAKERN_AT) {
  host::load_matrices({"load_matrix_x4", file, line}, r, 4, shared_row, false);
}
inline void load_matrix_x4_transposed(unsigned (&r)[4], const void* shared_row, OFAKERN_AT) {
  host::load_matrices({"load_matrix_x4_transposed", file, line}, r, 4, shared_row, true);
}
inline void load_matrix_x2(unsigned (&r)[2], const void* shared_row, OFAKERN_AT) {
  host::load_matrices({"load_matrix_x2", file, line}, r, 2, shared_row, false);
}
inline void load_matrix_x2_transposed(unsigned (&r)[2], const void* shared_row, OFAKERN_AT) {
  host::load_matrices({"load_matrix_x2_transposed", file, line}, r, 2, shared_row, true);
}

inline void copy_async_16(void* shared, const void* global, bool valid = true, OFAKERN_AT) {
  host::copy_later({"copy_async_16", file, line}, shared, global, 16, valid);
}
inline void copy_async_8(void* shared, const void* global, bool valid = true, OFAKERN_AT) {
  host::copy_later({"copy_async_8", file, line}, shared, global, 8, valid);
}
inline void copy_async_4(void* shared, const void* global, bool valid = true, OFAKERN_AT) {
  host::copy_later({"copy_async_4", file, line}, shared, global, 4, valid);
}
inline void copy_async_commit() { host::close_copies(); }
template <int n>
void copy_async_wait() {
  host::finish_copies(n);
}

template <auto kernel, class... P>
void launch_as(void (*)(P...), const Grid& grid, typename Given<P>::type... arguments) {
  std::tuple<P...> values(arguments...);
  host::run(
      kernel_text<kernel>(), grid,
      [](void* of_all) { std::apply(kernel, *static_cast<const std::tuple<P...>*>(of_all)); }, &values);
}

template <auto kernel, class... A>
void launch(const Grid& grid, Stream, const A&... arguments) {
  launch_as<kernel>(kernel, grid, arguments...);
}

#undef OFAKERN_AT

}  // namespace ofakern::simt

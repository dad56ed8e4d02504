// The device side of simt.h: names for CUDA's own instructions (PTX ISA 8, sm_80 and newer).
#pragma once

#include "core/launch.h"

#define OFAKERN_SHARED(type, name, count) __shared__ alignas(16) type name[count]

namespace ofakern::simt {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ std::byte* dynamic_shared() {
  extern __shared__ uint4 ofakern_dynamic_shared[];
  return reinterpret_cast<std::byte*>(ofakern_dynamic_shared);
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ void thread_fence() { __threadfence(); }
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x & 31); }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x >> 5); }

template <class T>
__device__ __forceinline__ T shuffle(T v, int source) {
  return __shfl_sync(kAllLanes, v, source);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(kAllLanes, v, mask);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T v, unsigned n) {
  return __shfl_up_sync(kAllLanes, v, n);
}
template <class T>
__device__ __forceinline__ T shuffle_down(T v, unsigned n) {
  return __shfl_down_sync(kAllLanes, v, n);
}
__device__ __forceinline__ unsigned ballot(bool p) { return __ballot_sync(kAllLanes, p); }
__device__ __forceinline__ bool any(bool p) { return __any_sync(kAllLanes, p) != 0; }
__device__ __forceinline__ bool all(bool p) { return __all_sync(kAllLanes, p) != 0; }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = fmaxf(v, shuffle_xor(v, mask));
  return v;
}

// The value before.
template <class T>
__device__ __forceinline__ T atomic_add(T* to, T v) {
  static_assert(std::is_integral_v<T>);
  return atomicAdd(to, v);
}
template <class T>
__device__ __forceinline__ T atomic_or(T* to, T v) {
  static_assert(std::is_integral_v<T>);
  return atomicOr(to, v);
}
template <class T>
__device__ __forceinline__ T atomic_min(T* to, T v) {
  static_assert(std::is_integral_v<T>);
  return atomicMin(to, v);
}
template <class T>
__device__ __forceinline__ T atomic_max(T* to, T v) {
  static_assert(std::is_integral_v<T>);
  return atomicMax(to, v);
}

template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Eight-by-eight matrices of 16-bit numbers: lane n gives the address of row n % 8 of matrix n / 8, 16 bytes.
__device__ __forceinline__ void load_matrix_x4(unsigned (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(unsigned (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x2(unsigned (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x2_transposed(unsigned (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
}

__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_8(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 8 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// Throws BackendError, or Error for what an earlier call left behind (core/cuda_error.h).
void launch_kernel(const void* kernel, const char* text, const Grid& grid, void** arguments, Stream stream);

template <class... P>
void launch_as(void (*kernel)(P...), const char* text, const Grid& grid, Stream stream,
               typename Given<P>::type... arguments) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  launch_kernel(reinterpret_cast<const void*>(kernel), text, grid, pointers, stream);
}

template <auto kernel, class... A>
void launch(const Grid& grid, Stream stream, const A&... arguments) {
  launch_as(kernel, kernel_text<kernel>(), grid, stream, arguments...);
}

}  // namespace ofakern::simt

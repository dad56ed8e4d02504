// All that a CUDA kernel's source includes: CUDA's language, and its warp, tensor-core and copy instructions by name.
//
// The same source compiles for a GPU (nvcc) and, with OFAKERN_SIMT_HOST, for an emulator on the host (simt_host.h),
// which runs a block's threads in turns. Beside what is below, both give in ofakern::simt:
//
//   OFAKERN_SHARED(type, name, count);         a static shared array; starts as NaN bytes in the emulator
//   std::byte* dynamic_shared()                the block's dynamic shared memory, aligned to 16 bytes
//   sync_block(), sync_warp(), thread_fence()
//   lane(), warp()                             of this thread; blocks are one-dimensional, of whole warps
//   shuffle(v, source), shuffle_xor(v, mask), shuffle_up(v, n), shuffle_down(v, n)      v of 32 or 64 bits
//   ballot(p), any(p), all(p), warp_sum(float), warp_max(float)
//   atomic_add, atomic_min, atomic_max, atomic_or         integers only: sums of floats would depend on the order
//   mma_16x8x16<T>(d, a, b)                    d += a b; T: __nv_bfloat16 or __half (PTX mma.m16n8k16, sm_80)
//   load_matrix_x4(r, shared_row), load_matrix_x2, load_matrix_x4_transposed, load_matrix_x2_transposed   (ldmatrix)
//   copy_async_16(shared, global, valid), copy_async_8, copy_async_4     zeros where not valid; global is not read then
//   copy_async_commit(), copy_async_wait<n>()  all groups but the latest n have arrived
//   launch<kernel<T>>(Grid{blocks, threads, shared_bytes}, stream, arguments...)
//
// All lanes of a warp, or threads of a block, must reach its operations, and at the same place in the source.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(OFAKERN_SIMT_HOST)
#include "core/simt_host.h"
#else
#include "core/simt_device.h"
#endif
#include "core/tensor_view.h"

namespace ofakern::simt {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    static_assert(std::is_same_v<T, float>);
    return x;
  }
}

// Calls body with a value of the storage type that `dtype` names: float, bf16 or f16 (an op's checks have refused all
// others).
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::bf16:
      return body(__nv_bfloat16{});
    case DType::f16:
      return body(__half{});
    default:
      return body(float{});
  }
}

}  // namespace ofakern::simt

// A borrowed tensor: what kernels see of one. Knows no framework.
#pragma once

#include <cstdint>

// Inlined always: an out-of-line copy compiled with AVX-512 flags would be a weak symbol that the linker may keep for
// all.
#define OFAKERN_ALWAYS_INLINE inline __attribute__((always_inline))

namespace ofakern {

enum class DType : std::uint8_t { f32, f16, bf16, f64, i32, i64, u8 };
enum class Device : std::uint8_t { cpu, cuda };

constexpr int kMaxDims = 8;

// `ndim == -1` marks an argument that was not given (None on the Python side).
struct TensorView {
  void* data = nullptr;
  std::int64_t shape[kMaxDims] = {};
  std::int64_t stride[kMaxDims] = {};  // in elements
  int ndim = -1;
  DType dtype = DType::f32;
  Device device = Device::cpu;
  int device_index = 0;

  OFAKERN_ALWAYS_INLINE bool defined() const { return ndim >= 0; }
  OFAKERN_ALWAYS_INLINE std::int64_t numel() const {
    if (ndim < 0) return 0;
    std::int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
  template <class T>
  OFAKERN_ALWAYS_INLINE T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace ofakern

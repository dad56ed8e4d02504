// A thread per rotation. A block's records pass through shared memory, so that neighbouring threads read and write
// neighbouring addresses. The maths: rotation_6d_cpu.cpp and README.md.
#include "core/simt.h"
#include "ops/rotation_6d/rotation_6d.h"

namespace ofakern {
namespace {

constexpr int kThreads = 128;
constexpr float kEps = 1e-12f;

struct Vector3 {
  float x, y, z;
};

__device__ __forceinline__ float dot3(const Vector3& a, const Vector3& b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
__device__ __forceinline__ Vector3 cross3(const Vector3& a, const Vector3& b) {
  return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}
// a + s * b
__device__ __forceinline__ Vector3 add_scaled(const Vector3& a, float s, const Vector3& b) {
  return {a.x + s * b.x, a.y + s * b.y, a.z + s * b.z};
}

// A direction, and what its gradient needs: d(direction) = slope * (g - (direction . g) direction), or slope * g below
// eps.
struct Direction {
  Vector3 of;
  float slope;  // 1 / max(length, eps)
  float bends;  // 1, or 0 below eps
};

__device__ __forceinline__ Direction normalised(const Vector3& a) {
  const float length = sqrtf(dot3(a, a));
  const float slope = 1.0f / (length > kEps ? length : kEps);
  return {{slope * a.x, slope * a.y, slope * a.z}, slope, length > kEps ? 1.0f : 0.0f};
}

__device__ __forceinline__ Vector3 through(const Direction& d, const Vector3& g) {
  const Vector3 bent = add_scaled(g, -d.bends * dot3(d.of, g), d.of);
  return {d.slope * bent.x, d.slope * bent.y, d.slope * bent.z};
}

// A record's numbers offset, offset + step and offset + 2 step.
__device__ __forceinline__ Vector3 load3(const float* record, int offset, int step) {
  return {record[offset], record[offset + step], record[offset + 2 * step]};
}
__device__ __forceinline__ void store3(const Vector3& a, float* record, int offset, int step) {
  record[offset] = a.x;
  record[offset + step] = a.y;
  record[offset + 2 * step] = a.z;
}

// The block's `count` numbers, all threads side by side.
template <class T>
__device__ __forceinline__ void gather(const T* from, float* shared, int count) {
  for (int n = threadIdx.x; n < count; n += kThreads) shared[n] = simt::to_float(from[n]);
}
template <class T>
__device__ __forceinline__ void scatter(const float* shared, T* to, int count) {
  for (int n = threadIdx.x; n < count; n += kThreads) to[n] = simt::from_float<T>(shared[n]);
}

// How many of `all` rotations are this block's.
__device__ __forceinline__ int block_share(std::int64_t first, std::int64_t all) {
  return static_cast<int>(all - first < kThreads ? all - first : kThreads);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    rotation_forward(const T* __restrict__ x, T* __restrict__ out, std::int64_t rotations) {
  OFAKERN_SHARED(float, in, 6 * kThreads);
  OFAKERN_SHARED(float, result, 9 * kThreads);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads;
  const int count = block_share(first, rotations), mine = static_cast<int>(threadIdx.x);
  gather(x + 6 * first, in, 6 * count);
  simt::sync_block();
  if (mine < count) {
    const Vector3 a2 = load3(in + 6 * mine, 3, 1);
    const Direction b1 = normalised(load3(in + 6 * mine, 0, 1));
    const Direction b2 = normalised(add_scaled(a2, -dot3(b1.of, a2), b1.of));
    float* const columns = result + 9 * mine;
    store3(b1.of, columns, 0, 3);
    store3(b2.of, columns, 1, 3);
    store3(cross3(b1.of, b2.of), columns, 2, 3);
  }
  simt::sync_block();
  scatter(result, out + 9 * first, 9 * count);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    rotation_backward(const T* __restrict__ dout, const T* __restrict__ x, T* __restrict__ dx, std::int64_t rotations) {
  OFAKERN_SHARED(float, in, 6 * kThreads);
  OFAKERN_SHARED(float, grads, 9 * kThreads);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads;
  const int count = block_share(first, rotations), mine = static_cast<int>(threadIdx.x);
  gather(x + 6 * first, in, 6 * count);
  gather(dout + 9 * first, grads, 9 * count);
  simt::sync_block();
  if (mine < count) {
    const float* const g = grads + 9 * mine;
    const Vector3 a2 = load3(in + 6 * mine, 3, 1);
    const Direction b1 = normalised(load3(in + 6 * mine, 0, 1));
    const float along = dot3(b1.of, a2);
    const Direction b2 = normalised(add_scaled(a2, -along, b1.of));
    const Vector3 g3 = load3(g, 2, 3);
    const Vector3 g2 = add_scaled(load3(g, 1, 3), 1.0f, cross3(g3, b1.of));
    const Vector3 du = through(b2, g2);
    const float b1_du = dot3(b1.of, du);
    Vector3 g1 = add_scaled(load3(g, 0, 3), 1.0f, cross3(b2.of, g3));
    g1 = add_scaled(add_scaled(g1, -along, du), -b1_du, a2);
    // This thread's record is read: its gradient takes its place.
    store3(add_scaled(du, -b1_du, b1.of), in + 6 * mine, 3, 1);
    store3(through(b1, g1), in + 6 * mine, 0, 1);
  }
  simt::sync_block();
  scatter(in, dx + 6 * first, 6 * count);
}

simt::Grid grid_of(std::int64_t rotations) {
  return {dim3(static_cast<unsigned>((rotations + kThreads - 1) / kThreads)), dim3(kThreads)};
}

}  // namespace

void rotation_6d_forward_cuda(const TensorView& x, const TensorView& out, Stream stream) {
  check_rotation_6d_forward(x, out);
  const std::int64_t rotations = x.numel() / 6;
  if (rotations == 0) return;
  simt::with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    simt::launch<rotation_forward<T>>(grid_of(rotations), stream, x.as<const T>(), out.as<T>(), rotations);
  });
}

void rotation_6d_backward_cuda(const TensorView& dout, const TensorView& x, const TensorView& dx, Stream stream) {
  check_rotation_6d_backward(dout, x, dx);
  const std::int64_t rotations = x.numel() / 6;
  if (rotations == 0) return;
  simt::with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    simt::launch<rotation_backward<T>>(grid_of(rotations), stream, dout.as<const T>(), x.as<const T>(), dx.as<T>(),
                                       rotations);
  });
}

}  // namespace ofakern

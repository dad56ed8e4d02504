// Kernels that show what the emulator does and finds: each has a right form, or a fault it must report.
#include <pybind11/pybind11.h>

#include "core/simt.h"
#include "tensor_caster.h"

namespace py = pybind11;

namespace ofakern {
namespace {

using simt::Grid;

// Turns a block's numbers around through shared memory; without the barrier it is wrong.
__global__ void reverse(const float* in, float* out, bool barrier) {
  OFAKERN_SHARED(float, all, 128);
  const int t = static_cast<int>(threadIdx.x);
  all[t] = in[blockIdx.x * 128 + t];
  if (barrier) simt::sync_block();
  out[blockIdx.x * 128 + t] = all[127 - t];
}

// A running sum within warps by neighbours in shared memory; each step needs both of its warp barriers.
__global__ void warp_scan(const float* in, float* out, bool barrier) {
  OFAKERN_SHARED(float, all, 128);
  const int t = static_cast<int>(threadIdx.x), lane = simt::lane();
  all[t] = in[t];
  simt::sync_warp();
  for (int step = 1; step < 32; step *= 2) {
    const float other = lane >= step ? all[t - step] : 0.0f;
    if (barrier) simt::sync_warp();
    all[t] += other;
    simt::sync_warp();
  }
  out[t] = all[t];
}

// What lanes say to one another, eight results a lane.
__global__ void lanes(const float* in, float* out) {
  const int t = static_cast<int>(threadIdx.x);
  const float v = in[t];
  float* const mine = out + 8 * t;
  mine[0] = simt::shuffle(v, 5);
  mine[1] = simt::shuffle_xor(v, 3);
  mine[2] = simt::shuffle_up(v, 2u);
  mine[3] = simt::shuffle_down(v, 2u);
  mine[4] = simt::warp_sum(v);
  mine[5] = simt::warp_max(v);
  mine[6] = static_cast<float>(__popc(simt::ballot(v > 0.0f)));
  mine[7] = (simt::any(v > 0.5f) ? 1.0f : 0.0f) + (simt::all(v > -100.0f) ? 2.0f : 0.0f);
}

// D = A B: A [16, 16] row-major, B [8, 16] by columns, D [16, 8]. Rows of `kPad` elements in shared memory.
template <class T>
__global__ void product(const T* a, const T* b, float* d, bool transposed) {
  constexpr int kPad = 24;
  OFAKERN_SHARED(T, tile_a, 16 * kPad);
  OFAKERN_SHARED(T, tile_b, 16 * kPad);
  const int t = static_cast<int>(threadIdx.x);
  for (int n = t; n < 256; n += 32) tile_a[n / 16 * kPad + n % 16] = a[n];
  // [8 columns][16], or as it would lie row-major: [16][8 columns]
  for (int n = t; n < 128; n += 32) tile_b[transposed ? n % 16 * kPad + n / 16 : n / 16 * kPad + n % 16] = b[n];
  simt::sync_block();
  unsigned of_a[4], of_b[2];
  simt::load_matrix_x4(of_a, tile_a + t % 16 * kPad + t / 16 * 8);
  if (transposed) {
    simt::load_matrix_x2_transposed(of_b, tile_b + t % 16 * kPad);
  } else {
    simt::load_matrix_x2(of_b, tile_b + t % 8 * kPad + t / 8 % 2 * 8);
  }
  float sums[4] = {};
  simt::mma_16x8x16<T>(sums, of_a, of_b);
  for (int r = 0; r < 4; ++r) d[(t / 4 + 8 * (r / 2)) * 8 + 2 * (t % 4) + r % 2] = sums[r];
}

// Two stages of asynchronous copies of 32 x 16 bytes; `wait` false reads the first before it came.
__global__ void staged(const float* in, float* out, int valid, bool wait) {
  auto* const tile = reinterpret_cast<float*>(simt::dynamic_shared());
  const int t = static_cast<int>(threadIdx.x);
  for (int stage = 0; stage < 2; ++stage) {
    const int at = stage * 128 + 4 * t;
    simt::copy_async_16(tile + at, in + at, at < valid);
    simt::copy_async_commit();
  }
  if (wait) simt::copy_async_wait<1>();
  simt::sync_block();
  for (int n = 0; n < 4; ++n) out[4 * t + n] = tile[4 * ((t + 1) % 32) + n];
  simt::copy_async_wait<0>();
  simt::sync_block();
  for (int n = 0; n < 4; ++n) out[128 + 4 * t + n] = tile[128 + 4 * ((t + 1) % 32) + n];
}

__global__ void one_leaves(float* out) {
  if (threadIdx.x == 7) return;
  simt::sync_block();
  out[threadIdx.x] = 1.0f;
}

__global__ void two_places(float* out) {
  if (threadIdx.x % 2 == 0) {
    simt::sync_warp();
  } else {
    out[threadIdx.x] = simt::warp_sum(1.0f);
  }
}

__global__ void past_the_end(float* out) {
  auto* const all = reinterpret_cast<float*>(simt::dynamic_shared());
  all[threadIdx.x + 1] = 1.0f;  // the launch gives 32 of them
  out[threadIdx.x] = all[threadIdx.x + 1];
}

__global__ void count_positive(const float* in, int* counts) {
  if (in[blockIdx.x * 64 + threadIdx.x] > 0.0f) simt::atomic_add(counts, 1);
  simt::atomic_max(counts + 1, static_cast<int>(blockIdx.x));
  simt::atomic_min(counts + 2, static_cast<int>(threadIdx.x));
}

TensorView view(const py::handle& tensor) { return view_of("emulator", "tensor", tensor); }

template <class T>
void launch_product(const py::object& a, const py::object& b, const py::object& d, bool transposed) {
  simt::launch<product<T>>(Grid{1, 32}, nullptr, view(a).as<const T>(), view(b).as<const T>(), view(d).as<float>(),
                           transposed);
}

}  // namespace

void bind_emulator_kernels(py::module_& m) {
  m.def("test_reverse", [](const py::object& in, const py::object& out, bool barrier) {
    simt::launch<reverse>(Grid{static_cast<unsigned>(view(in).numel() / 128), 128}, nullptr, view(in).as<const float>(),
                          view(out).as<float>(), barrier);
  });
  m.def("test_warp_scan", [](const py::object& in, const py::object& out, bool barrier) {
    simt::launch<warp_scan>(Grid{1, 128}, nullptr, view(in).as<const float>(), view(out).as<float>(), barrier);
  });
  m.def("test_lanes", [](const py::object& in, const py::object& out) {
    simt::launch<lanes>(Grid{1, static_cast<unsigned>(view(in).numel())}, nullptr, view(in).as<const float>(),
                        view(out).as<float>());
  });
  m.def("test_product_bf16", &launch_product<__nv_bfloat16>);
  m.def("test_product_f16", &launch_product<__half>);
  m.def("test_staged", [](const py::object& in, const py::object& out, int valid, bool wait) {
    simt::launch<staged>(Grid{1, 32, 1024}, nullptr, view(in).as<const float>(), view(out).as<float>(), valid, wait);
  });
  m.def("test_one_leaves",
        [](const py::object& out) { simt::launch<one_leaves>(Grid{1, 64}, nullptr, view(out).as<float>()); });
  m.def("test_two_places",
        [](const py::object& out) { simt::launch<two_places>(Grid{1, 32}, nullptr, view(out).as<float>()); });
  m.def("test_past_the_end",
        [](const py::object& out) { simt::launch<past_the_end>(Grid{1, 32, 128}, nullptr, view(out).as<float>()); });
  m.def("test_threads", [](const py::object& out, unsigned threads, std::size_t shared) {
    simt::launch<one_leaves>(Grid{1, threads, shared}, nullptr, view(out).as<float>());
  });
  m.def("test_count_positive", [](const py::object& in, const py::object& counts) {
    simt::launch<count_positive>(Grid{static_cast<unsigned>(view(in).numel() / 64), 64}, nullptr,
                                 view(in).as<const float>(), view(counts).as<int>());
  });
}

}  // namespace ofakern

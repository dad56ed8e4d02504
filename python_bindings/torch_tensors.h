// Tensors that torch makes for a call: its results and its scratch memory. Kernels never allocate.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <vector>

#include "core/tensor_view.h"

namespace ofakern {

// A view of a binding's own memory: numbers that Python gave as lists, a piece of the workspace.
TensorView row_major_view(void* data, DType dtype, std::initializer_list<std::int64_t> shape);

// A u8 tensor [bytes] in memory of core/kept_memory.h; None where the system has none.
pybind11::object kept_bytes(std::int64_t bytes);

// Row-major tensors that are not written yet, on the CPU or on the device of one that is given. The GIL is held
// wherever this class is used; views stay valid as long as it lives.
class Made {
 public:
  Made() = default;
  explicit Made(const TensorView& beside) : device_(beside.device), device_index_(beside.device_index) {}
  TensorView empty(DType dtype, std::initializer_list<std::int64_t> shape);
  TensorView like(const TensorView& x);  // of its dtype and shape; of None a scalar, for the op's checks to refuse x
  // Zeros like x that are no memory until they are written (core/kept_memory.h); undefined, and no result, where the
  // system has none.
  TensorView unwritten_zeros(const TensorView& x);
  TensorView none();  // None among the results
  // Scratch of at least `bytes`. On the CPU what is small is one tensor per thread, which its calls use in turn; a
  // GPU's calls may overlap, and torch's allocator keeps the memory of each for its stream.
  TensorView workspace(std::int64_t bytes);

  pybind11::object results() const;  // all but the scratch, in order: a tuple, or the only one itself

 private:
  TensorView empty(DType dtype, const std::int64_t* shape, int ndim);

  pybind11::object make(DType dtype, const std::int64_t* shape, int ndim) const;

  std::vector<pybind11::object> results_;
  pybind11::object scratch_;
  Device device_ = Device::cpu;
  int device_index_ = 0;
};

}  // namespace ofakern

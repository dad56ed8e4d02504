// Tensors that torch makes for a call: its results and its scratch memory. Kernels never allocate.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <vector>

#include "core/tensor_view.h"

namespace ofakern {

// Row-major CPU tensors that are not written yet. The GIL is held wherever this class is used; views stay valid as long
// as it lives.
class Made {
 public:
  TensorView empty(DType dtype, std::initializer_list<std::int64_t> shape);
  TensorView like(const TensorView& x);  // of its dtype and shape; of None a scalar, for the op's checks to refuse x
  TensorView none();                     // None among the results
  // Scratch of at least `bytes`. What is small is one tensor per thread, which its calls use in turn.
  TensorView workspace(std::int64_t bytes);

  pybind11::object results() const;  // all but the scratch, in order: a tuple, or the only one itself

 private:
  TensorView empty(DType dtype, const std::int64_t* shape, int ndim);

  std::vector<pybind11::object> results_;
  pybind11::object scratch_;
};

}  // namespace ofakern

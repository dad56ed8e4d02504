// torch.Tensor -> TensorView through DLPack's C exchange table: no libtorch, no reference counting, dtype and size
// known.
//
// A view borrows: it is valid while the Python argument lives. Views are made with the GIL held; kernels run without
// it.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor_view.h"
#include "dlpack.h"

namespace ofakern {

// The exchange table of an object's type, cached per type (Tensor and Parameter are two).
// Throws TypeError for what is no tensor, BackendError for a torch without the table (before 2.11).
const dlpack::ExchangeApi& exchange_api(const char* where, const char* argument, pybind11::handle object);

// None gives an undefined view. Refused: no tensor, fake and meta tensors (they have no data), dtypes kernels do not
// know, devices other than CPU and CUDA, more than 8 dimensions, views with the negative bit (DLPack drops it
// silently).
TensorView view_of(const char* where, const char* argument, pybind11::handle object);
// The same without the question for the negative bit: of tensors that are known not to have it.
TensorView memory_of(const char* where, const char* argument, pybind11::handle object);

// torch's current stream on the device of `x`; null on the CPU. The GIL is held.
Stream current_stream(const TensorView& x);

// What becomes of a tensor that a kernel cannot read as it is: refused, or a copy takes its place. A copy is for inputs
// only: results written to one would be lost.
enum class Unready { refused, copied };

// Reads a call's arguments in order, each by the name its messages should carry.
class Arguments {
 public:
  Arguments(const char* where, const pybind11::args& args, std::size_t count, Unready unready = Unready::refused);
  TensorView tensor(const char* argument);                // row-major, where it may be copied
  TensorView rows(const char* argument);                  // of any strides but the last one
  std::vector<TensorView> tensors(const char* argument);  // a list, none of it None
  double real(const char* argument);
  std::int64_t integer(const char* argument);
  bool flag(const char* argument) { return integer(argument) != 0; }
  int threads();  // how many a kernel may use: 1..4096

 private:
  pybind11::handle next();
  TensorView read(const char* argument, pybind11::handle object, bool (*ready)(const TensorView&));

  const char* where_;
  const pybind11::args& args_;
  Unready unready_;
  std::vector<pybind11::object> copies_;
  std::size_t position_ = 0;
};

// C++ errors of csrc/core/check.h become the classes of ofakern/errors.py.
void register_errors();

}  // namespace ofakern

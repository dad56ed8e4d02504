// torch.Tensor -> TensorView through DLPack's C exchange table: no libtorch, no reference counting, dtype and size
// known.
//
// A view borrows: it is valid while the Python argument lives. Views are made with the GIL held; kernels run without
// it.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor_view.h"
#include "dlpack.h"

namespace ofakern {

// The exchange table of an object's type, cached per type (Tensor and Parameter are two).
// Throws TypeError for what is no tensor, BackendError for a torch without the table (before 2.11).
const dlpack::ExchangeApi& exchange_api(const char* where, const char* argument, pybind11::handle object);

// That of torch.Tensor itself.
const dlpack::ExchangeApi& torch_exchange_api();

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
  // The same where what a kernel reads is a property of all together: all are copied unless `ready(all)`.
  template <class Ready>
  std::vector<TensorView> tensors(const char* argument, const Ready& ready) {
    const pybind11::handle list = peek();
    std::vector<TensorView> views = tensors(argument, &any_strides);
    if (unready_ == Unready::refused || ready(views)) return views;
    return row_major(argument, list);
  }
  double real(const char* argument);
  std::int64_t integer(const char* argument);
  std::vector<double> reals(const char* argument);           // a list or tuple
  std::vector<std::int64_t> integers(const char* argument);  // the same
  std::string text(const char* argument);
  bool flag(const char* argument) { return integer(argument) != 0; }
  int threads();  // how many a kernel may use: 1..4096

 private:
  static bool any_strides(const TensorView&) { return true; }
  pybind11::handle peek() const;
  pybind11::handle next();
  std::vector<TensorView> tensors(const char* argument, bool (*ready)(const TensorView&));
  std::vector<TensorView> row_major(const char* argument, pybind11::handle list);
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

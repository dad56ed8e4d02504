// Errors in the house's words: "<where>: <argument> must <rule>, got <value>", then "Try: ..." where there is a remedy.
//
// For <op>.cpp and the bindings only. Files compiled per ISA take checked views: they include no standard containers,
// so that no weak symbol compiled for a newer CPU can replace the baseline's.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "core/tensor_view.h"

namespace ofakern {

// The bindings turn these into OfakernValueError, OfakernTypeError and BackendError of ofakern/errors.py.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct ValueError : Error {
  using Error::Error;
};
struct TypeError : Error {
  using Error::Error;
};
struct BackendError : Error {
  using Error::Error;
};

const char* name_of(DType dtype);              // as torch names it: "bfloat16"
std::int64_t size_of(DType dtype);             // bytes of one element
std::string describe(const TensorView& x);     // "float32[2, 8]", "float16[3] on cuda:1", "None"
bool is_contiguous(const TensorView& x);       // row-major; dimensions of size 1 and empty tensors do not matter
bool is_last_contiguous(const TensorView& x);  // the same of its last dimension alone
void set_kernel_device(int index);             // the GPU of this thread's call (core/call_device.h)

// The checks of one op, a constant of its <op>.cpp: constexpr Checker kCheck("attention");
// Each throws on the first broken rule; `argument` is the name the caller knows.
class Checker {
 public:
  constexpr explicit Checker(const char* where) : where_(where) {}

  [[noreturn]] void fail_value(const std::string& argument, const std::string& rule, const std::string& got,
                               const std::string& remedy = {}) const;
  [[noreturn]] void fail_type(const std::string& argument, const std::string& rule, const std::string& got,
                              const std::string& remedy = {}) const;

  // The scalar rule: check.that(scale > 0, "scale", "be positive", std::to_string(scale)).
  void that(bool holds, const char* argument, const std::string& rule, const std::string& got) const {
    if (!holds) fail_value(argument, rule, got);
  }

  void given(const char* argument, const TensorView& x) const;
  void absent(const char* argument, const TensorView& x, const char* because) const;
  void dtype(const char* argument, const TensorView& x, std::initializer_list<DType> allowed) const;
  void same_dtype(const char* argument, const TensorView& x, const char* as_argument, const TensorView& as) const;
  void ndim(const char* argument, const TensorView& x, int ndim, const char* letters) const;
  // letters names the dimensions, "[Nq, H, K]"; -1 accepts any size.
  void shape(const char* argument, const TensorView& x, const char* letters,
             std::initializer_list<std::int64_t> sizes) const;
  void contiguous(const char* argument, const TensorView& x) const;
  void last_contiguous(const char* argument, const TensorView& x) const;
  void device(const char* argument, const TensorView& x, Device device, int index = 0) const;
  // Where this module's kernels run: on the CPU, or on the GPU of the call.
  void device(const char* argument, const TensorView& x) const;
  // What most arguments are: given, of this dtype and shape, where kernels run, contiguous.
  void plain(const char* argument, const TensorView& x, const char* letters, std::initializer_list<std::int64_t> sizes,
             DType dtype) const;
  // A u8 scratch of at least `bytes` bytes where kernels run, aligned to 64.
  void workspace(const char* argument, const TensorView& x, std::int64_t bytes) const;

 private:
  const char* where_;
};

}  // namespace ofakern

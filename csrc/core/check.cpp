#include "core/check.h"

namespace ofakern {
namespace {

// The emulated kernels (core/simt_host.h) run where the CPU's do.
#ifdef OFAKERN_KERNELS_ON_CUDA
constexpr Device kKernelDevice = Device::cuda;
#else
constexpr Device kKernelDevice = Device::cpu;
#endif
thread_local int kernel_device_index = 0;

std::string message(const char* where, const std::string& argument, const std::string& rule, const std::string& got,
                    const std::string& remedy) {
  std::string text = std::string(where) + ": " + argument + " must " + rule + ", got " + got;
  if (!remedy.empty()) text += "\nTry: " + remedy;
  return text;
}

std::string join(const std::int64_t* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

std::string name_of(Device device, int index) {
  return device == Device::cpu ? "cpu" : "cuda:" + std::to_string(index);
}

}  // namespace

void set_kernel_device(int index) { kernel_device_index = index; }

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
    case DType::f64:
      return "float64";
    case DType::i32:
      return "int32";
    case DType::i64:
      return "int64";
    case DType::u8:
      return "uint8";
  }
  return "unknown";
}

std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::u8:
      return 1;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f64:
    case DType::i64:
      return 8;
  }
  return 0;
}

std::string describe(const TensorView& x) {
  if (!x.defined()) return "None";
  std::string text = name_of(x.dtype) + join(x.shape, x.ndim);
  if (x.device != Device::cpu) text += " on " + name_of(x.device, x.device_index);
  return text;
}

bool is_contiguous(const TensorView& x) {
  if (x.numel() == 0) return true;
  std::int64_t expected = 1;
  for (int d = x.ndim - 1; d >= 0; --d) {
    if (x.shape[d] != 1 && x.stride[d] != expected) return false;
    expected *= x.shape[d];
  }
  return true;
}

bool is_last_contiguous(const TensorView& x) {
  return x.ndim <= 0 || x.numel() == 0 || x.shape[x.ndim - 1] <= 1 || x.stride[x.ndim - 1] == 1;
}

void Checker::fail_value(const std::string& argument, const std::string& rule, const std::string& got,
                         const std::string& remedy) const {
  throw ValueError(message(where_, argument, rule, got, remedy));
}

void Checker::fail_type(const std::string& argument, const std::string& rule, const std::string& got,
                        const std::string& remedy) const {
  throw TypeError(message(where_, argument, rule, got, remedy));
}

void Checker::given(const char* argument, const TensorView& x) const {
  if (!x.defined()) fail_type(argument, "be a tensor", "None");
}

void Checker::absent(const char* argument, const TensorView& x, const char* because) const {
  if (x.defined()) fail_value(argument, std::string("be None ") + because, describe(x));
}

void Checker::dtype(const char* argument, const TensorView& x, std::initializer_list<DType> allowed) const {
  given(argument, x);
  std::string names;
  std::size_t left = allowed.size();
  for (DType dtype : allowed) {
    if (x.dtype == dtype) return;
    names += name_of(dtype);
    --left;
    if (left > 0) names += left == 1 ? " or " : ", ";
  }
  fail_type(argument, "be " + names, describe(x));
}

void Checker::same_dtype(const char* argument, const TensorView& x, const char* as_argument,
                         const TensorView& as) const {
  if (x.dtype != as.dtype) {
    fail_type(argument, std::string("have ") + as_argument + "'s dtype (" + name_of(as.dtype) + ")", describe(x));
  }
}

void Checker::ndim(const char* argument, const TensorView& x, int ndim, const char* letters) const {
  given(argument, x);
  if (x.ndim != ndim) fail_value(argument, std::string("have the dimensions ") + letters, describe(x));
}

void Checker::shape(const char* argument, const TensorView& x, const char* letters,
                    std::initializer_list<std::int64_t> sizes) const {
  ndim(argument, x, static_cast<int>(sizes.size()), letters);
  int d = 0;
  for (std::int64_t size : sizes) {
    if (size >= 0 && x.shape[d] != size) {
      std::string wanted = "[";
      int e = 0;
      for (std::int64_t s : sizes) {
        wanted += (e++ ? ", " : "") + (s < 0 ? std::string("any") : std::to_string(s));
      }
      fail_value(argument, std::string("have shape ") + letters + " = " + wanted + "]", describe(x));
    }
    ++d;
  }
}

void Checker::contiguous(const char* argument, const TensorView& x) const {
  if (!is_contiguous(x)) {
    fail_value(argument, "be contiguous", describe(x) + " with strides " + join(x.stride, x.ndim));
  }
}

void Checker::last_contiguous(const char* argument, const TensorView& x) const {
  if (!is_last_contiguous(x)) {
    fail_value(argument, "be contiguous in its last dimension",
               describe(x) + " with strides " + join(x.stride, x.ndim));
  }
}

void Checker::device(const char* argument, const TensorView& x, Device device, int index) const {
  if (x.device != device || (device == Device::cuda && x.device_index != index)) {
    fail_value(argument, "be on " + name_of(device, index), name_of(x.device, x.device_index));
  }
}

void Checker::device(const char* argument, const TensorView& x) const {
  device(argument, x, kKernelDevice, kernel_device_index);
}

void Checker::plain(const char* argument, const TensorView& x, const char* letters,
                    std::initializer_list<std::int64_t> sizes, DType dtype) const {
  this->dtype(argument, x, {dtype});
  shape(argument, x, letters, sizes);
  device(argument, x);
  contiguous(argument, x);
}

void Checker::workspace(const char* argument, const TensorView& x, std::int64_t bytes) const {
  dtype(argument, x, {DType::u8});
  device(argument, x);
  contiguous(argument, x);
  if (x.numel() < bytes) {
    fail_value(argument, "hold at least " + std::to_string(bytes) + " bytes", std::to_string(x.numel()));
  }
  if (bytes > 0 && reinterpret_cast<std::uintptr_t>(x.data) % 64 != 0) {
    fail_value(argument, "be aligned to 64 bytes",
               "an address " + std::to_string(reinterpret_cast<std::uintptr_t>(x.data) % 64) + " past");
  }
}

}  // namespace ofakern

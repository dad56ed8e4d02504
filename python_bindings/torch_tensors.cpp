#include "torch_tensors.h"

#include <algorithm>

#include "core/huge_pages.h"
#include "core/kept_memory.h"
#include "tensor_caster.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr std::int64_t kKeptBytes = std::int64_t{1} << 20;
constexpr int kMaxDevices = 64;

// Handles of torch's that live as long as the process: dropping them at its end would need a Python that is gone.
struct Torch {
  PyObject *empty_strided, *keywords, *cpu, *dtypes[7];
  PyObject* gpus[kMaxDevices] = {};
  PyObject* quick;  // inductor's own allocator, which takes half as long: past the dispatcher, CPU only; or null

  Torch() {
    static constexpr const char* kNames[7] = {"float32", "float16", "bfloat16", "float64", "int32", "int64", "uint8"};
    const py::module_ torch = py::module_::import("torch");
    empty_strided = py::object(torch.attr("empty_strided")).release().ptr();
    keywords = py::make_tuple("dtype", "device").release().ptr();
    cpu = py::object(torch.attr("device")("cpu")).release().ptr();
    for (int n = 0; n < 7; ++n) dtypes[n] = py::object(torch.attr(kNames[n])).release().ptr();
    py::object found = torch;
    for (const char* name : {"_C", "_dynamo", "guards", "_empty_strided_cpu"})
      found = py::getattr(found, name, py::none());  // no part of torch's public interface
    quick = found.is_none() ? nullptr : found.release().ptr();
  }

  PyObject* device(Device kind, int index) {
    if (kind == Device::cpu) return cpu;
    if (index < 0 || index >= kMaxDevices) throw Error("ofakern: a device must have an index below 64");
    if (gpus[index] == nullptr)
      gpus[index] = py::object(py::module_::import("torch").attr("device")("cuda", index)).release().ptr();
    return gpus[index];
  }
};

dlpack::DataType to_dlpack(DType dtype) {
  const auto code = [dtype] {
    switch (dtype) {
      case DType::bf16:
        return dlpack::kBfloat;
      case DType::i32:
      case DType::i64:
        return dlpack::kInt;
      case DType::u8:
        return dlpack::kUInt;
      default:
        return dlpack::kFloat;
    }
  };
  return {code(), static_cast<std::uint8_t>(8 * size_of(dtype)), 1};
}

// A tensor of torch's in memory of core/kept_memory.h, which `give` takes back when the tensor goes.
struct LargeTensor {
  dlpack::ManagedTensor managed;
  std::int64_t shape[kMaxDims], strides[kMaxDims];
  std::int64_t held;
  void (*give)(void* data, std::int64_t held);

  static void drop(dlpack::ManagedTensor* managed) {
    LargeTensor* const self = static_cast<LargeTensor*>(managed->context);
    self->give(managed->tensor.data, self->held);
    delete self;
  }
};

// Row-major, of `held` bytes at `data`. Null where `data` is.
py::object make_large(DType dtype, const std::int64_t* shape, int ndim, void* data, std::int64_t held,
                      void (*give)(void*, std::int64_t)) {
  if (data == nullptr) return py::object();
  LargeTensor* const large = new LargeTensor{};
  large->held = held;
  large->give = give;
  std::int64_t stride = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    large->shape[d] = shape[d];
    large->strides[d] = stride;
    stride *= shape[d];
  }
  large->managed = {{dlpack::kMajorVersion, dlpack::kMinorVersion}, large, &LargeTensor::drop, 0, {}};
  large->managed.tensor = {data, {dlpack::kCpu, 0}, ndim, to_dlpack(dtype), large->shape, large->strides, 0};
  void* tensor = nullptr;
  if (torch_exchange_api().managed_tensor_to_py_object_no_sync(&large->managed, &tensor) != 0) {
    LargeTensor::drop(&large->managed);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor));
}

// In memory that is kept when the tensor goes. Null where torch's allocator has to do.
py::object make_kept(DType dtype, const std::int64_t* shape, int ndim, std::int64_t bytes) {
  std::int64_t held = 0;
  void* const data = take_memory(bytes, &held);
  return make_large(dtype, shape, ndim, data, held, &give_memory);
}

}  // namespace

py::object kept_bytes(std::int64_t bytes) {
  const py::object made = make_kept(DType::u8, &bytes, 1, bytes);
  return made ? made : py::none();
}

py::object Made::make(DType dtype, const std::int64_t* shape, int ndim) const {
  std::int64_t bytes = size_of(dtype);
  for (int d = 0; d < ndim; ++d) bytes *= shape[d];
  if (device_ == Device::cpu && bytes >= kSmallestKept)
    if (py::object large = make_kept(dtype, shape, ndim, bytes)) return large;
  static Torch* const torch = new Torch();
  const py::tuple sizes(static_cast<std::size_t>(ndim)), strides(static_cast<std::size_t>(ndim));
  std::int64_t stride = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    PyTuple_SET_ITEM(sizes.ptr(), d, py::int_(shape[d]).release().ptr());
    PyTuple_SET_ITEM(strides.ptr(), d, py::int_(stride).release().ptr());
    stride *= std::max<std::int64_t>(shape[d], 1);
  }
  // Not torch.empty: with a tuple of sizes its arguments take half as long again to read.
  const bool quick = torch->quick != nullptr && device_ == Device::cpu;
  PyObject* const arguments[] = {sizes.ptr(), strides.ptr(), torch->dtypes[static_cast<int>(dtype)],
                                 torch->device(device_, device_index_)};
  PyObject* const tensor = quick ? PyObject_Vectorcall(torch->quick, arguments, 3, nullptr)
                                 : PyObject_Vectorcall(torch->empty_strided, arguments, 2, torch->keywords);
  if (tensor == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(tensor);
}

TensorView row_major_view(void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.ndim = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), view.shape);
  std::int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    view.stride[d] = stride;
    stride *= std::max<std::int64_t>(view.shape[d], 1);
  }
  return view;
}

TensorView Made::empty(DType dtype, const std::int64_t* shape, int ndim) {
  results_.push_back(make(dtype, shape, ndim));
  const TensorView view = memory_of("torch.empty_strided", "its result", results_.back());
  // Large results are fresh memory, whose pages cost as much as a kernel's pass over them unless they are large too.
  if (device_ == Device::cpu) prefer_huge_pages(view.data, view.numel() * size_of(dtype));
  return view;
}

TensorView Made::empty(DType dtype, std::initializer_list<std::int64_t> shape) {
  return empty(dtype, shape.begin(), static_cast<int>(shape.size()));
}

TensorView Made::like(const TensorView& x) { return empty(x.dtype, x.shape, std::max(x.ndim, 0)); }

TensorView Made::unwritten_zeros(const TensorView& x) {
  const std::int64_t bytes = x.numel() * size_of(x.dtype);
  if (device_ != Device::cpu || bytes < kSmallestKept) return {};
  py::object made = make_large(x.dtype, x.shape, x.ndim, take_zeros(bytes), bytes, &drop_zeros);
  if (!made) return {};
  results_.push_back(std::move(made));
  return memory_of("torch.empty_strided", "its result", results_.back());
}

TensorView Made::none() {
  results_.push_back(py::none());
  return {};
}

TensorView Made::workspace(std::int64_t bytes) {
  if (bytes > kKeptBytes || device_ != Device::cpu) {
    scratch_ = make(DType::u8, &bytes, 1);
    return memory_of("torch.empty_strided", "its result", scratch_);
  }
  // Python drops the dictionary, and with it the tensor, when the thread ends.
  static PyObject* const key = PyUnicode_InternFromString("ofakern.workspace");
  PyObject* const of_thread = PyThreadState_GetDict();
  if (of_thread == nullptr) throw py::error_already_set();
  if (PyObject* const kept = PyDict_GetItemWithError(of_thread, key)) {
    const TensorView view = memory_of("ofakern", "the kept workspace", kept);
    if (view.numel() >= bytes) return view;
  }
  const std::int64_t size = std::max<std::int64_t>(bytes, kKeptBytes / 4);
  const py::object fresh = make(DType::u8, &size, 1);
  if (PyDict_SetItem(of_thread, key, fresh.ptr()) != 0) throw py::error_already_set();
  return memory_of("torch.empty_strided", "its result", fresh);
}

py::object Made::results() const {
  if (results_.size() == 1) return results_[0];
  const py::tuple all(results_.size());
  for (std::size_t n = 0; n < results_.size(); ++n)
    PyTuple_SET_ITEM(all.ptr(), static_cast<py::ssize_t>(n), results_[n].inc_ref().ptr());
  return all;
}

}  // namespace ofakern

#include "tensor_caster.h"

#include <utility>
#include <vector>

namespace py = pybind11;

namespace ofakern {
namespace {

std::string type_name(py::handle object) {
  const py::handle type = py::type::handle_of(object);
  const std::string module = py::str(type.attr("__module__"));
  const std::string name = py::str(type.attr("__qualname__"));
  return module == "builtins" ? name : module + "." + name;
}

// torch's errors carry a C++ stack below their first line.
std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

const dlpack::ExchangeApi& find_exchange_api(const char* where, const char* argument, py::handle object) {
  const py::handle type = py::type::handle_of(object);
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) {
    if (!py::isinstance(object, py::module_::import("torch").attr("Tensor"))) {
      Checker(where).fail_type(argument, "be a torch.Tensor", type_name(object));
    }
    throw BackendError(
        std::string(where) + ": " + argument + " must be a tensor with DLPack's C exchange table, got one of torch " +
        std::string(py::str(py::module_::import("torch").attr("__version__"))) + "\nTry: torch 2.11 or newer");
  }
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->version.major != dlpack::kMajorVersion || api->tensor_from_py_object_no_sync == nullptr) {
    throw BackendError(std::string(where) + ": " + argument +
                       " must come with DLPack 1.x's exchange table, got version " +
                       std::to_string(api->version.major) + "." + std::to_string(api->version.minor));
  }
  return *api;
}

bool to_dtype(dlpack::DataType type, DType* out) {
  if (type.lanes != 1) return false;
  struct Known {
    dlpack::TypeCode code;
    int bits;
    DType dtype;
  };
  static constexpr Known kKnown[] = {
      {dlpack::kFloat, 32, DType::f32}, {dlpack::kInt, 32, DType::i32},   {dlpack::kBfloat, 16, DType::bf16},
      {dlpack::kFloat, 16, DType::f16}, {dlpack::kFloat, 64, DType::f64}, {dlpack::kInt, 64, DType::i64},
      {dlpack::kUInt, 8, DType::u8},    {dlpack::kBool, 8, DType::u8},
  };
  for (const Known& known : kKnown) {
    if (known.code == type.code && known.bits == type.bits) {
      *out = known.dtype;
      return true;
    }
  }
  return false;
}

// torch may keep a negation as a bit of the tensor (the imaginary part of a conjugate, which no integer is); DLPack
// hands over the memory without it.
bool is_negated(py::handle tensor, DType dtype) {
  if (dtype == DType::i32 || dtype == DType::i64 || dtype == DType::u8) return false;
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  PyObject* const result = PyObject_CallMethodNoArgs(tensor.ptr(), name);
  if (result == nullptr) throw py::error_already_set();
  const bool negated = result == Py_True;
  Py_DECREF(result);
  return negated;
}

double to_real(const char* where, const char* argument, py::handle object) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1.0 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    Checker(where).fail_type(argument, "be a float", type_name(object));
  }
  return value;
}

std::int64_t to_integer(const char* where, const char* argument, py::handle object) {
  const long long value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    Checker(where).fail_type(argument, "be an int of 64 bits", type_name(object));
  }
  return value;
}

py::sequence sequence(const char* where, const char* argument, py::handle object) {
  const bool fits = PyList_Check(object.ptr()) || PyTuple_Check(object.ptr());
  if (!fits) Checker(where).fail_type(argument, "be a list or tuple of numbers", type_name(object));
  return py::reinterpret_borrow<py::sequence>(object);
}

}  // namespace

const dlpack::ExchangeApi& exchange_api(const char* where, const char* argument, py::handle object) {
  // Types are few and kept alive by the reference taken here, so an address never comes back as another type.
  static auto* const cache = new std::vector<std::pair<PyTypeObject*, const dlpack::ExchangeApi*>>();
  PyTypeObject* const type = Py_TYPE(object.ptr());
  for (const auto& [known, api] : *cache) {
    if (known == type) return *api;
  }
  const dlpack::ExchangeApi& api = find_exchange_api(where, argument, object);
  Py_INCREF(type);
  cache->emplace_back(type, &api);
  return api;
}

TensorView memory_of(const char* where, const char* argument, py::handle object) {
  TensorView view;
  if (object.is_none()) return view;
  const Checker check(where);
  const dlpack::ExchangeApi& api = exchange_api(where, argument, object);
  dlpack::Tensor tensor{};
  if (api.tensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) {
    const py::error_already_set error;
    check.fail_type(argument, "be a dense CPU or CUDA tensor", first_line(py::str(error.value())));
  }
  if (tensor.device.device_type == dlpack::kCpu) {
    view.device = Device::cpu;
  } else if (tensor.device.device_type == dlpack::kCuda) {
    view.device = Device::cuda;
    view.device_index = tensor.device.device_id;
  } else {
    check.fail_value(argument, "be on the CPU or a CUDA device", std::string(py::str(object.attr("device"))));
  }
  if (!to_dtype(tensor.dtype, &view.dtype)) {
    check.fail_type(argument, "be float32, float16, bfloat16, float64, int32, int64, uint8 or bool",
                    std::string(py::str(object.attr("dtype"))));
  }
  if (tensor.ndim > kMaxDims) {
    check.fail_value(argument, "have at most " + std::to_string(kMaxDims) + " dimensions", std::to_string(tensor.ndim));
  }
  view.ndim = tensor.ndim;
  for (int d = 0; d < tensor.ndim; ++d) {
    view.shape[d] = tensor.shape[d];
    view.stride[d] = tensor.strides[d];
  }
  if (tensor.data == nullptr && view.numel() > 0) {
    check.fail_type(argument, "hold data", "a " + type_name(object) + " without any (fake or meta)");
  }
  view.data = tensor.data == nullptr ? nullptr : static_cast<char*>(tensor.data) + tensor.byte_offset;
  return view;
}

TensorView view_of(const char* where, const char* argument, py::handle object) {
  const TensorView view = memory_of(where, argument, object);
  if (view.defined() && is_negated(object, view.dtype)) {
    Checker(where).fail_value(argument, "not be a negative-bit view", describe(view),
                              argument + std::string(".resolve_neg()"));
  }
  return view;
}

const dlpack::ExchangeApi& torch_exchange_api() {
  static const dlpack::ExchangeApi* const api = [] {
    const py::object tensor = py::module_::import("torch").attr("empty")(0);
    return &exchange_api("ofakern", "torch.Tensor", tensor);
  }();
  return *api;
}

Stream current_stream(const TensorView& x) {
  if (x.device == Device::cpu) return nullptr;
  void* stream = nullptr;
  if (torch_exchange_api().current_work_stream(dlpack::kCuda, x.device_index, &stream) != 0)
    throw py::error_already_set();
  return stream;
}

Arguments::Arguments(const char* where, const py::args& args, std::size_t count, Unready unready)
    : where_(where), args_(args), unready_(unready) {
  if (args.size() != count) {
    throw py::type_error(std::string(where) + " takes " + std::to_string(count) + " arguments, got " +
                         std::to_string(args.size()));
  }
}

py::handle Arguments::peek() const { return PyTuple_GET_ITEM(args_.ptr(), static_cast<py::ssize_t>(position_)); }

py::handle Arguments::next() {
  const py::handle object = peek();
  ++position_;
  return object;
}

TensorView Arguments::read(const char* argument, py::handle object, bool (*ready)(const TensorView&)) {
  if (unready_ == Unready::refused) return view_of(where_, argument, object);
  const TensorView view = memory_of(where_, argument, object);
  if (!view.defined() || (ready(view) && !is_negated(object, view.dtype))) return view;
  copies_.push_back(object.attr("resolve_neg")());
  if (!ready(memory_of(where_, argument, copies_.back()))) copies_.back() = copies_.back().attr("contiguous")();
  return memory_of(where_, argument, copies_.back());
}

TensorView Arguments::tensor(const char* argument) { return read(argument, next(), &is_contiguous); }

TensorView Arguments::rows(const char* argument) { return read(argument, next(), &is_last_contiguous); }

std::vector<TensorView> Arguments::tensors(const char* argument) { return tensors(argument, &is_contiguous); }

std::vector<TensorView> Arguments::tensors(const char* argument, bool (*ready)(const TensorView&)) {
  const py::handle object = next();
  const Checker check(where_);
  if (!PyList_Check(object.ptr())) check.fail_type(argument, "be a list of tensors", type_name(object));
  std::vector<TensorView> views;
  for (const py::handle item : py::reinterpret_borrow<py::list>(object)) {
    const std::string name = argument + ("[" + std::to_string(views.size()) + "]");
    views.push_back(read(name.c_str(), item, ready));
    check.given(name.c_str(), views.back());
  }
  return views;
}

std::vector<TensorView> Arguments::row_major(const char* argument, py::handle list) {
  std::vector<TensorView> views;
  for (const py::handle item : py::reinterpret_borrow<py::list>(list)) {
    copies_.push_back(item.attr("resolve_neg")().attr("contiguous")());
    views.push_back(memory_of(where_, argument, copies_.back()));
  }
  return views;
}

double Arguments::real(const char* argument) { return to_real(where_, argument, next()); }

std::int64_t Arguments::integer(const char* argument) { return to_integer(where_, argument, next()); }

std::vector<double> Arguments::reals(const char* argument) {
  std::vector<double> values;
  for (const py::handle item : sequence(where_, argument, next())) values.push_back(to_real(where_, argument, item));
  return values;
}

std::vector<std::int64_t> Arguments::integers(const char* argument) {
  std::vector<std::int64_t> values;
  for (const py::handle item : sequence(where_, argument, next())) values.push_back(to_integer(where_, argument, item));
  return values;
}

std::string Arguments::text(const char* argument) {
  const py::handle object = next();
  if (!PyUnicode_Check(object.ptr())) Checker(where_).fail_type(argument, "be a str", type_name(object));
  return py::reinterpret_borrow<py::str>(object);
}

int Arguments::threads() {
  const std::int64_t threads = integer("threads");
  Checker(where_).that(threads >= 1 && threads <= 4096, "threads", "be in 1..4096", std::to_string(threads));
  return static_cast<int>(threads);
}

void register_errors() {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    const auto raise = [](const char* name, const Error& error) {
      PyErr_SetString(py::module_::import("ofakern.errors").attr(name).ptr(), error.what());
    };
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const ValueError& error) {
      raise("OfakernValueError", error);
    } catch (const TypeError& error) {
      raise("OfakernTypeError", error);
    } catch (const BackendError& error) {
      raise("BackendError", error);
    } catch (const Error& error) {
      raise("OfakernRuntimeError", error);
    }
  });
}

}  // namespace ofakern

// The part of DLPack 1.3 that the bindings read. The layout is public and frozen within major version 1
// (https://github.com/dmlc/dlpack, RFC #175): a framework publishes a table of functions on its tensor type.
#pragma once

#include <cstdint>

namespace ofakern::dlpack {

constexpr std::uint32_t kMajorVersion = 1, kMinorVersion = 3;

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  DeviceType device_type;
  std::int32_t device_id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  struct {
    std::uint32_t major;
    std::uint32_t minor;
  } version;
  void* context;  // the owner's
  void (*deleter)(ManagedTensor* self);
  std::uint64_t flags;
  Tensor tensor;
};

struct ExchangeApi {
  struct {
    std::uint32_t major;
    std::uint32_t minor;
  } version;
  void* prev_api;
  // Two functions that the bindings never call.
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  // A Python tensor that owns `tensor` from then on; 0 on success, -1 with a Python error set.
  int (*managed_tensor_to_py_object_no_sync)(ManagedTensor* tensor, void** out);
  // Fills a borrowed view; 0 on success, -1 with a Python error set. May be null.
  int (*tensor_from_py_object_no_sync)(void* py_object, Tensor* out);
  int (*current_work_stream)(DeviceType device_type, std::int32_t device_id, void** out_stream);
};

}  // namespace ofakern::dlpack

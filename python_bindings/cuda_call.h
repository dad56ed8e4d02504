// What a binding needs to call kernels on a GPU as torch would: its device and its stream.
#pragma once

#include "core/call_device.h"
#include "core/stream.h"
#include "tensor_caster.h"

namespace ofakern {

// While it lives the device of `x` is current, checks ask for it, and `stream()` is torch's current stream there. The
// GIL is held when it is made.
class CudaCall {
 public:
  CudaCall(const char* where, const char* argument, const TensorView& x)
      : device_(kernel_device(where, argument, x)), stream_(current_stream(x)) {}
  Stream stream() const { return stream_; }

 private:
  static int kernel_device(const char* where, const char* argument, const TensorView& x);

  CallDevice device_;
  Stream stream_;
};

}  // namespace ofakern

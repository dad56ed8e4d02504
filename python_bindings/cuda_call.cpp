#include "cuda_call.h"

namespace ofakern {

int CudaCall::kernel_device(const char* where, const char* argument, const TensorView& x) {
  const Checker check(where);
  check.given(argument, x);
#ifdef OFAKERN_KERNELS_ON_CUDA
  check.that(x.device == Device::cuda, argument, "be on a CUDA device", describe(x));
#else
  check.that(x.device == Device::cpu, argument, "be on the CPU, where the emulator runs", describe(x));
#endif
  return x.device_index;
}

}  // namespace ofakern

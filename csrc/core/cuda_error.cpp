#include "core/cuda_error.h"

#include <driver_types.h>

#include "core/check.h"
#include "core/launch.h"

namespace ofakern {

void throw_launch_error(const std::string& kernel, int status, const std::string& text, const std::string& gpu) {
  const std::string where = "CUDA kernel " + kernel + ": ";
  switch (static_cast<cudaError_t>(status)) {
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
      throw BackendError(where + "there must be a GPU, got none (" + text + ")\nTry: backend='cpu' on CPU tensors.");
    case cudaErrorInsufficientDriver:
    case cudaErrorCallRequiresNewerDriver:
    case cudaErrorUnsupportedPtxVersion:
      throw BackendError(
          where + "the driver must be as new as CUDA " + OFAKERN_CUDA_VERSION + ", got an older one (" + text +
          ")\nTry: a newer NVIDIA driver (nvidia-smi shows yours), or ofakern built with an older toolkit.");
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidKernelImage:
    case cudaErrorInvalidDeviceFunction:
      throw BackendError(where + "the GPU must be one that ofakern was built for (" + OFAKERN_CUDA_ARCHITECTURES +
                         "), got " + gpu + " (" + text +
                         ")\nTry: pip install . -Ccmake.define.OFAKERN_CUDA_ARCHITECTURES=native");
    case cudaErrorMemoryAllocation:
      throw Error(where + "the GPU must have memory left for the kernel's code and stack, got none (" + text +
                  ")\nTry: a smaller batch.");
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorLaunchOutOfResources:
      throw Error(where + "its launch was refused by " + gpu + " (" + text +
                  ")\nTry: report this call with its shapes.");
    case cudaErrorIllegalAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorAssert:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorECCUncorrectable:
    case cudaErrorContextIsDestroyed:
      // A launch returns before its kernel runs: what these tell happened to another one.
      throw Error(where + "not launched: an earlier kernel or copy of this process failed (" + text +
                  "), and its GPU takes no more work\nTry: CUDA_LAUNCH_BLOCKING=1, which raises where it happened.");
    default:
      throw Error(where + "its launch failed: " + text);
  }
}

namespace simt {

// g++: "... [with auto kernel = f<float>]"; clang: "... [kernel = &f<float>]".
std::string kernel_name(const char* text) {
  const std::string all(text);
  const std::size_t at = all.find("kernel = ");
  if (at == std::string::npos) return all;
  std::string name = all.substr(at + 9);
  name = name.substr(0, name.rfind(']'));
  for (const char* drop : {"&", "ofakern::", "{anonymous}::", "(anonymous namespace)::"}) {
    for (std::size_t n; (n = name.find(drop)) != std::string::npos;) name.erase(n, std::string(drop).size());
  }
  return name;
}

}  // namespace simt
}  // namespace ofakern

// Launches on a GPU (core/simt_device.h), and the device of a call (core/call_device.h).
#include <cuda_runtime_api.h>

#include <string>

#include "core/call_device.h"
#include "core/check.h"
#include "core/cuda_error.h"
#include "core/launch.h"

namespace ofakern {
namespace {

constexpr std::size_t kSharedByDefault = std::size_t{48} << 10;

std::string gpu_name() {
  int device = 0;
  cudaDeviceProp properties;
  if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&properties, device) != cudaSuccess)
    return "an unknown GPU";
  return std::string(properties.name) + " (compute capability " + std::to_string(properties.major) + "." +
         std::to_string(properties.minor) + ")";
}

void require(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it is told here and to nobody else
  throw_launch_error(what, status, cudaGetErrorString(status), gpu_name());
}

}  // namespace

CallDevice::CallDevice(int index) : index_(index) {
  require(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ != index_) require(cudaSetDevice(index_), "cudaSetDevice");
  set_kernel_device(index_);
}

CallDevice::~CallDevice() {
  if (previous_ != index_) cudaSetDevice(previous_);
}

namespace simt {

void launch_kernel(const void* kernel, const char* text, const Grid& grid, void** arguments, Stream stream) {
  if (grid.shared_bytes > kSharedByDefault)
    require(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes)),
        kernel_name(text));
  const cudaError_t status = cudaLaunchKernel(kernel, grid.blocks, grid.threads, arguments, grid.shared_bytes,
                                              static_cast<cudaStream_t>(stream));
  if (status != cudaSuccess) require(status, kernel_name(text));
}

}  // namespace simt
}  // namespace ofakern

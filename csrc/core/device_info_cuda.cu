#include <cuda_runtime_api.h>

#include "core/check.h"
#include "core/device_info.h"

namespace ofakern {
namespace {

void require(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Error(std::string(what) + ": " + cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  require(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

int cuda_driver_version() {
  int version = 0;
  require(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

int cuda_runtime_version() {
  int version = 0;
  require(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

std::vector<DeviceInfo> cuda_devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    cudaGetLastError();  // clears the error, so that a later call does not report it
    return {};
  }
  require(status, "cudaGetDeviceCount");
  std::vector<DeviceInfo> devices(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    require(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
    DeviceInfo& info = devices[static_cast<std::size_t>(i)];
    info.name = properties.name;
    info.memory_bytes = static_cast<std::int64_t>(properties.totalGlobalMem);
    info.major = attribute(cudaDevAttrComputeCapabilityMajor, i);
    info.minor = attribute(cudaDevAttrComputeCapabilityMinor, i);
    info.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, i);
  }
  return devices;
}

}  // namespace ofakern

// What `ofakern info` says about each CUDA device.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ofakern {

struct DeviceInfo {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  std::int64_t memory_bytes = 0;
  int multiprocessors = 0;
};

// Versions are as CUDA writes them: 13000 is 13.0. driver is 0 when no driver is installed.
int cuda_driver_version();
int cuda_runtime_version();

// Empty when there is no driver or no device; throws Error when the driver fails otherwise.
std::vector<DeviceInfo> cuda_devices();

}  // namespace ofakern

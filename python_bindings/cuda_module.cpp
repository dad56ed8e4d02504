// ofakern._cuda: what needs the CUDA toolkit; imported on first use. Signatures: ofakern/_cuda.pyi.
#include <pybind11/pybind11.h>

#include "core/device_info.h"
#include "cuda_ops.h"
#include "tensor_caster.h"

namespace py = pybind11;

namespace {

py::list devices() {
  py::list list;
  for (const ofakern::DeviceInfo& info : ofakern::cuda_devices()) {
    py::dict entry;
    entry["name"] = info.name;
    entry["compute_capability"] = py::make_tuple(info.major, info.minor);
    entry["memory_bytes"] = info.memory_bytes;
    entry["multiprocessors"] = info.multiprocessors;
    list.append(entry);
  }
  return list;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  ofakern::register_errors();
  m.def("devices", &devices);
  m.def("driver_version", &ofakern::cuda_driver_version);
  m.def("runtime_version", &ofakern::cuda_runtime_version);
  m.attr("architectures") = OFAKERN_CUDA_ARCHITECTURES;
  ofakern::bind_cuda_ops(m);
}

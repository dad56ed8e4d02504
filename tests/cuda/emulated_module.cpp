// ofakern._cuda's twin for the emulator: the same bindings and kernels on CPU tensors, and what only tests ask for.
#include <pybind11/pybind11.h>

#include "core/call_device.h"
#include "core/simt.h"
#include "cuda_ops.h"
#include "tensor_caster.h"

namespace ofakern {

CallDevice::CallDevice(int index) : index_(index) {}
CallDevice::~CallDevice() = default;

void bind_emulator_kernels(pybind11::module_& m);

}  // namespace ofakern

PYBIND11_MODULE(ofakern_cuda_emulated, m) {
  ofakern::register_errors();
  ofakern::bind_cuda_ops(m);
  ofakern::bind_emulator_kernels(m);
  m.def("set_seed", &ofakern::simt::host::set_seed);
  m.def("fail_next_launch", &ofakern::simt::host::fail_next_launch);
}

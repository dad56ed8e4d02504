// ops.log_mel on a GPU: inputs as log_mel_forward's in bind_log_mel.cpp, without the number of threads; the result is
// made here. bounds stays on the host.
#include <pybind11/pybind11.h>

#include "cuda_call.h"
#include "cuda_ops.h"
#include "ops/log_mel/log_mel.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

py::object forward(const py::args& values) {
  Arguments args("log_mel", values, 15);
  LogMelInputs in;
  in.wave = args.tensor("wave");
  in.bounds = args.tensor("bounds");
  in.window = args.tensor("window");
  in.roots = args.tensor("roots");
  in.first = args.tensor("first");
  in.offsets = args.tensor("offsets");
  in.weights = args.tensor("weights");
  in.hop = args.integer("hop");
  in.first_sample = args.integer("first_sample");
  in.mirror_repeats_edge = args.flag("mirror_repeats_edge");
  in.remove_dc = args.flag("remove_dc");
  in.preemphasis = args.real("preemphasis");
  in.power = static_cast<int>(args.integer("power"));
  in.whisper = args.flag("whisper");
  in.floor = args.real("floor");
  const CudaCall call("log_mel", "wave", in.wave);
  const std::int64_t bytes = log_mel_cuda_workspace(in);  // after its checks the shapes below are there
  Made made(in.wave);
  const std::int64_t rows = in.bounds.as<const std::int64_t>()[in.bounds.numel() - 1];
  const TensorView out = made.empty(DType::f32, {rows, in.first.shape[0]}), workspace = made.workspace(bytes);
  {
    const py::gil_scoped_release release;
    log_mel_cuda(in, out, workspace, call.stream());
  }
  return made.results();
}

}  // namespace

void bind_log_mel_cuda(py::module_& m) { m.def("log_mel", &forward); }

}  // namespace ofakern

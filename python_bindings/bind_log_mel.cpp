// ops.log_mel: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "ops/log_mel/log_mel.h"
#include "tensor_caster.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr std::size_t kInputs = 16;  // what read_inputs takes, threads included

struct Call {
  LogMelInputs inputs;
  int threads;
};

Call read_inputs(Arguments& args) {
  Call call;
  LogMelInputs& in = call.inputs;
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
  call.threads = args.threads();
  return call;
}

void forward(const py::args& values) {
  Arguments args("log_mel", values, 2 + kInputs);
  const TensorView out = args.tensor("out");
  const TensorView workspace = args.tensor("workspace");
  const Call call = read_inputs(args);
  const py::gil_scoped_release release;
  log_mel_cpu(call.inputs, out, workspace, call.threads);
}

std::int64_t workspace(const py::args& values) {
  Arguments args("log_mel", values, kInputs);
  const Call call = read_inputs(args);
  return log_mel_workspace(call.inputs, call.threads);
}

}  // namespace

void bind_log_mel(py::module_& m) {
  m.def("log_mel_forward", &forward);
  m.def("log_mel_workspace", &workspace);
}

}  // namespace ofakern

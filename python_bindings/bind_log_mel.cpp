// ops.log_mel: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "ops/log_mel/log_mel.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr std::size_t kInputs = 16;  // what read_inputs takes, threads included

struct Call {
  LogMelInputs inputs;
  int threads;
};

void read_tables(Arguments& args, LogMelInputs* in) {
  in->window = args.tensor("window");
  in->roots = args.tensor("roots");
  in->first = args.tensor("first");
  in->offsets = args.tensor("offsets");
  in->weights = args.tensor("weights");
}

void read_numbers(Arguments& args, LogMelInputs* in) {
  in->hop = args.integer("hop");
  in->first_sample = args.integer("first_sample");
  in->mirror_repeats_edge = args.flag("mirror_repeats_edge");
  in->remove_dc = args.flag("remove_dc");
  in->preemphasis = args.real("preemphasis");
  in->power = static_cast<int>(args.integer("power"));
  in->whisper = args.flag("whisper");
  in->floor = args.real("floor");
}

Call read_inputs(Arguments& args) {
  Call call;
  call.inputs.wave = args.tensor("wave");
  call.inputs.bounds = args.tensor("bounds");
  read_tables(args, &call.inputs);
  read_numbers(args, &call.inputs);
  call.threads = args.threads();
  return call;
}

// Lengths as bounds: 0 and the running sums.
void append_bounds(const std::vector<std::int64_t>& lengths, std::vector<std::int64_t>* bounds) {
  bounds->push_back(0);
  for (const std::int64_t length : lengths) bounds->push_back(bounds->back() + length);
}

void forward(const py::args& values) {
  Arguments args("log_mel", values, 2 + kInputs);
  const TensorView out = args.tensor("out");
  const TensorView workspace = args.tensor("workspace");
  const Call call = read_inputs(args);
  const py::gil_scoped_release release;
  log_mel_cpu(call.inputs, out, workspace, call.threads);
}

// Samples and frames of each waveform are two lists here.
py::object make_forward(const py::args& values) {
  Arguments args("log_mel", values, kInputs + 1, Unready::copied);
  LogMelInputs in;
  in.wave = args.tensor("wave");
  read_tables(args, &in);
  const std::vector<std::int64_t> lengths = args.integers("lengths"), frames = args.integers("frames");
  read_numbers(args, &in);
  const int threads = args.threads();
  Checker("log_mel").that(lengths.size() == frames.size(), "frames", "be one number per waveform",
                          std::to_string(frames.size()));
  std::vector<std::int64_t> bounds;
  append_bounds(lengths, &bounds);
  append_bounds(frames, &bounds);
  in.bounds = row_major_view(bounds.data(), DType::i64, {2, static_cast<std::int64_t>(lengths.size()) + 1});
  const std::int64_t bytes = log_mel_workspace(in, threads);  // after its checks `first` has one dimension
  Made made;
  const TensorView out = made.empty(DType::f32, {bounds.back(), in.first.shape[0]}), workspace = made.workspace(bytes);
  {
    const py::gil_scoped_release release;
    log_mel_cpu(in, out, workspace, threads);
  }
  return made.results();
}

std::int64_t workspace(const py::args& values) {
  Arguments args("log_mel", values, kInputs);
  const Call call = read_inputs(args);
  return log_mel_workspace(call.inputs, call.threads);
}

}  // namespace

void bind_log_mel(py::module_& m) {
  m.def("log_mel", &make_forward);
  m.def("log_mel_forward", &forward);
  m.def("log_mel_workspace", &workspace);
}

}  // namespace ofakern

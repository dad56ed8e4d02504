// ops.decode_attention: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "ops/decode_attention/decode_attention.h"
#include "tensor_caster.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr std::size_t kInputs = 14;  // what read_inputs takes, threads included

int read_threads(Arguments& args) {
  const std::int64_t threads = args.integer("threads");
  Checker("decode_attention")
      .that(threads >= 1 && threads <= 4096, "threads", "be in 1..4096", std::to_string(threads));
  return static_cast<int>(threads);
}

DecodeAttentionInputs read_inputs(Arguments& args) {
  DecodeAttentionInputs in;
  in.q = args.tensor("q");
  in.keys = args.tensor("keys");
  in.values = args.tensor("values");
  in.key_scales = args.tensor("key_scales");
  in.value_scales = args.tensor("value_scales");
  in.row_offsets = args.tensor("row_offsets");
  in.runs = args.tensor("runs");
  in.slots = args.tensor("slots");
  in.counts = args.tensor("counts");
  in.bias = args.tensor("bias");
  in.head_scale = args.tensor("head_scale");
  in.value_width = args.integer("value_width");
  in.scale = args.real("scale");
  return in;
}

void pack(const py::args& values) {
  Arguments args("decode_attention", values, 6);
  const TensorView keys = args.tensor("keys"), packed_values = args.tensor("values");
  const TensorView k = args.tensor("k"), v = args.tensor("v"), runs = args.tensor("runs");
  const int threads = read_threads(args);
  const py::gil_scoped_release release;
  decode_attention_pack(k, v, runs, keys, packed_values, threads);
}

std::int64_t workspace_bytes(const py::args& values) {
  Arguments args("decode_attention", values, kInputs);
  const DecodeAttentionInputs in = read_inputs(args);
  return decode_attention_workspace(in, read_threads(args));
}

void forward(const py::args& values) {
  Arguments args("decode_attention", values, 3 + kInputs);
  const TensorView out = args.tensor("out"), lse = args.tensor("lse"), workspace = args.tensor("workspace");
  const DecodeAttentionInputs in = read_inputs(args);
  const int threads = read_threads(args);
  const py::gil_scoped_release release;
  decode_attention_cpu(in, out, lse, workspace, threads);
}

}  // namespace

void bind_decode_attention(py::module_& m) {
  m.def("decode_attention_pack", pack);
  m.def("decode_attention_workspace", workspace_bytes);
  m.def("decode_attention_forward", forward);
}

}  // namespace ofakern

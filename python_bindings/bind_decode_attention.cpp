// ops.decode_attention: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "decode_attention_arguments.h"
#include "ops/decode_attention/decode_attention.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

void pack(const py::args& values) {
  Arguments args("decode_attention", values, 6);
  const TensorView keys = args.tensor("keys"), packed_values = args.tensor("values");
  const TensorView k = args.rows("k"), v = args.rows("v"), runs = args.tensor("runs");
  const int threads = args.threads();
  const py::gil_scoped_release release;
  decode_attention_pack(k, v, runs, keys, packed_values, threads);
}

void project(const py::args& values) {
  Arguments args("decode_attention", values, 10);
  const TensorView keys = args.tensor("keys"), packed_values = args.tensor("values");
  SourceProjection source;
  source.states = args.rows("states");
  source.packed = args.tensor("packed");
  source.bias = args.tensor("bias");
  source.runs = args.tensor("runs");
  source.heads = args.integer("heads");
  source.key_width = args.integer("key_width");
  source.value_width = args.integer("value_width");
  const int threads = args.threads();
  Made made;
  const TensorView workspace = made.workspace(decode_attention_project_workspace(source, threads));
  const py::gil_scoped_release release;
  decode_attention_project(source, keys, packed_values, workspace, threads);
}

std::int64_t workspace_bytes(const py::args& values) {
  Arguments args("decode_attention", values, kDecodeArguments);
  const DecodeAttentionInputs in = read_decode_attention(args);
  return decode_attention_workspace(in, args.threads());
}

void forward(const py::args& values) {
  Arguments args("decode_attention", values, 3 + kDecodeArguments);
  const TensorView out = args.tensor("out"), lse = args.tensor("lse"), workspace = args.tensor("workspace");
  const DecodeAttentionInputs in = read_decode_attention(args);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  decode_attention_cpu(in, out, lse, workspace, threads);
}

py::object make_forward(const py::args& values) {
  Arguments args("decode_attention", values, kDecodeArguments, Unready::copied);
  const DecodeAttentionInputs in = read_decode_attention(args);
  const int threads = args.threads();
  const std::int64_t bytes = decode_attention_workspace(in, threads);  // after its checks q has 3 dimensions
  Made made;
  const std::int64_t rows = in.q.shape[0], heads = in.q.shape[1];
  const TensorView out = made.empty(in.q.dtype, {rows, heads, in.value_width});
  const TensorView lse = made.empty(DType::f32, {rows, heads}), workspace = made.workspace(bytes);
  {
    const py::gil_scoped_release release;
    decode_attention_cpu(in, out, lse, workspace, threads);
  }
  return made.results();
}

}  // namespace

void bind_decode_attention(py::module_& m) {
  m.def("decode_attention", make_forward);
  m.def("decode_attention_pack", pack);
  m.def("decode_attention_project", project);
  m.def("decode_attention_workspace", workspace_bytes);
  m.def("decode_attention_forward", forward);
}

}  // namespace ofakern

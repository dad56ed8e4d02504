// ops.decode_attention on a GPU: the arguments of bind_decode_attention.cpp with `longest` in place of the threads.
#include <pybind11/pybind11.h>

#include "cuda_call.h"
#include "cuda_ops.h"
#include "decode_attention_arguments.h"
#include "ops/decode_attention/decode_attention.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

void run(const DecodeAttentionInputs& in, std::int64_t longest, const TensorView& out, const TensorView& lse,
         const TensorView& workspace, Stream stream) {
  const py::gil_scoped_release release;
  decode_attention_cuda(in, longest, out, lse, workspace, stream);
}

std::int64_t workspace_bytes(const py::args& values) {
  Arguments args("decode_attention", values, kDecodeArguments);
  const DecodeAttentionInputs in = read_decode_attention(args);
  const CudaCall call("decode_attention", "q", in.q);
  check_decode_attention_cuda(in);
  return decode_attention_workspace_cuda(in, args.integer("longest"));
}

void forward(const py::args& values) {
  Arguments args("decode_attention", values, 3 + kDecodeArguments);
  const TensorView out = args.tensor("out"), lse = args.tensor("lse"), workspace = args.tensor("workspace");
  const DecodeAttentionInputs in = read_decode_attention(args);
  const std::int64_t longest = args.integer("longest");
  const CudaCall call("decode_attention", "q", in.q);
  check_decode_attention_cuda(in);
  check_decode_attention_results(in, out, lse);
  Checker("decode_attention").workspace("workspace", workspace, decode_attention_workspace_cuda(in, longest));
  run(in, longest, out, lse, workspace, call.stream());
}

py::object make_forward(const py::args& values) {
  Arguments args("decode_attention", values, kDecodeArguments, Unready::copied);
  const DecodeAttentionInputs in = read_decode_attention(args);
  const std::int64_t longest = args.integer("longest");
  const CudaCall call("decode_attention", "q", in.q);
  check_decode_attention_cuda(in);
  Made made(in.q);
  const std::int64_t rows = in.q.shape[0], heads = in.q.shape[1];
  const TensorView out = made.empty(in.q.dtype, {rows, heads, in.value_width});
  const TensorView lse = made.empty(DType::f32, {rows, heads});
  run(in, longest, out, lse, made.workspace(decode_attention_workspace_cuda(in, longest)), call.stream());
  return made.results();
}

}  // namespace

void bind_decode_attention_cuda(py::module_& m) {
  m.def("decode_attention", make_forward);
  m.def("decode_attention_workspace", workspace_bytes);
  m.def("decode_attention_forward", forward);
}

}  // namespace ofakern

// ops.attention on a GPU: arguments as in bind_attention.cpp, without the number of threads.
#include <pybind11/pybind11.h>

#include "cuda_call.h"
#include "cuda_ops.h"
#include "ops/attention/attention.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr std::size_t kInputs = 22;  // what read_inputs takes

RelativeTermView read_term(Arguments& args, const char* const names[4]) {
  RelativeTermView term;
  term.table = args.tensor(names[0]);
  term.q_coord = args.tensor(names[1]);
  term.k_coord = args.tensor(names[2]);
  term.same = args.tensor(names[3]);
  return term;
}

AttentionInputs read_inputs(Arguments& args) {
  static constexpr const char* kTerms[2][4] = {{"tables[0]", "terms[0].q_coord", "terms[0].k_coord", "terms[0].same"},
                                               {"tables[1]", "terms[1].q_coord", "terms[1].k_coord", "terms[1].same"}};
  AttentionInputs in;
  in.q = args.rows("q");
  in.k = args.rows("k");
  in.v = args.rows("v");
  in.q_pos = args.rows("q_pos");
  in.k_pos = args.rows("k_pos");
  for (int t = 0; t < 2; ++t) in.terms[t] = read_term(args, kTerms[t]);
  in.head_scale = args.tensor("head_scale");
  in.dropout_seed = args.tensor("dropout_seed");
  in.layout.visible = args.tensor("visible");
  in.layout.q_offsets = args.tensor("q_offsets");
  in.layout.k_offsets = args.tensor("k_offsets");
  in.layout.key_seen = args.tensor("key_seen");
  in.layout.k_range = args.tensor("k_range");
  in.scale = args.real("scale");
  in.dropout_p = args.real("dropout_p");
  return in;
}

py::object make_forward(const py::args& values) {
  Arguments args("attention", values, kInputs, Unready::copied);
  const AttentionInputs in = read_inputs(args);
  const CudaCall call("attention", "q", in.q);
  const std::int64_t bytes = attention_forward_workspace_cuda(in);  // after its checks q and v have 3 dimensions
  Made made(in.q);
  const TensorView out = made.empty(in.q.dtype, {in.q.shape[0], in.q.shape[1], in.v.shape[2]});
  const TensorView lse = made.empty(DType::f32, {in.q.shape[0], in.q.shape[1]});
  const TensorView workspace = made.workspace(bytes);
  {
    const py::gil_scoped_release release;
    attention_forward_cuda(in, out, lse, workspace, call.stream());
  }
  return made.results();
}

TensorView make_like(Made& made, const TensorView& x) { return x.defined() ? made.like(x) : made.none(); }

// dq, dk, dv, dq_pos, dk_pos, both tables', head_scale's; None of what was not given.
py::object make_backward(const py::args& values) {
  Arguments args("attention", values, 4 + kInputs, Unready::copied);
  const TensorView out = args.tensor("out");
  const TensorView lse = args.tensor("lse");
  const TensorView dout = args.rows("dout");
  const TensorView dlse = args.tensor("dlse");
  const AttentionInputs in = read_inputs(args);
  const CudaCall call("attention", "q", in.q);
  const std::int64_t bytes = attention_backward_workspace_cuda(in);
  Made made(in.q);
  AttentionGradients gradients;
  gradients.dq = made.like(in.q);
  gradients.dk = made.like(in.k);
  gradients.dv = made.like(in.v);
  gradients.dq_pos = make_like(made, in.q_pos);
  gradients.dk_pos = make_like(made, in.k_pos);
  for (int t = 0; t < 2; ++t) gradients.dtables[t] = make_like(made, in.terms[t].table);
  gradients.dhead_scale = make_like(made, in.head_scale);
  const TensorView workspace = made.workspace(bytes);
  {
    const py::gil_scoped_release release;
    attention_backward_cuda(in, out, lse, dout, dlse, gradients, workspace, call.stream());
  }
  return made.results();
}

}  // namespace

void bind_attention_cuda(py::module_& m) {
  m.def("attention", &make_forward);
  m.def("attention_gradients", &make_backward);
}

}  // namespace ofakern

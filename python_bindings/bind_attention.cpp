// ops.attention: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include "ops/attention/attention_checked.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr std::size_t kInputs = 25;  // what read_inputs takes, threads included

struct Call {
  AttentionInputs inputs;
  int threads;
};

RelativeTermView read_term(Arguments& args, const char* const names[4]) {
  RelativeTermView term;
  term.table = args.tensor(names[0]);
  term.q_coord = args.tensor(names[1]);
  term.k_coord = args.tensor(names[2]);
  term.same = args.tensor(names[3]);
  return term;
}

Call read_inputs(Arguments& args) {
  static constexpr const char* kTerms[2][4] = {{"tables[0]", "terms[0].q_coord", "terms[0].k_coord", "terms[0].same"},
                                               {"tables[1]", "terms[1].q_coord", "terms[1].k_coord", "terms[1].same"}};
  Call call;
  AttentionInputs& in = call.inputs;
  in.q = args.rows("q");
  in.k = args.rows("k");
  in.v = args.rows("v");
  in.q_pos = args.rows("q_pos");
  in.k_pos = args.rows("k_pos");
  in.terms[0] = read_term(args, kTerms[0]);
  in.terms[1] = read_term(args, kTerms[1]);
  in.head_scale = args.tensor("head_scale");
  in.dropout_seed = args.tensor("dropout_seed");
  in.layout.visible = args.tensor("visible");
  in.layout.q_offsets = args.tensor("q_offsets");
  in.layout.k_offsets = args.tensor("k_offsets");
  in.layout.key_seen = args.tensor("key_seen");
  in.layout.k_range = args.tensor("k_range");
  in.layout.shared.sets = args.tensor("shared.sets");
  in.layout.shared.members = args.tensor("shared.members");
  in.scale = args.real("scale");
  in.dropout_p = args.real("dropout_p");
  call.threads = args.threads();
  return call;
}

void forward(const py::args& values) {
  Arguments args("attention", values, 3 + kInputs);
  const TensorView out = args.tensor("out");
  const TensorView lse = args.tensor("lse");
  const TensorView workspace = args.tensor("workspace");
  const Call call = read_inputs(args);
  const py::gil_scoped_release release;
  attention_forward_cpu(call.inputs, out, lse, workspace, call.threads);
}

py::object make_forward(const py::args& values) {
  Arguments args("attention", values, kInputs, Unready::copied);
  const Call call = read_inputs(args);
  const AttentionInputs& in = call.inputs;
  check_attention(in);  // q and v have 3 dimensions then
  const std::int64_t bytes = checked_attention_forward_workspace(in, call.threads);
  Made made;
  const TensorView out = made.empty(in.q.dtype, {in.q.shape[0], in.q.shape[1], in.v.shape[2]});
  const TensorView lse = made.empty(DType::f32, {in.q.shape[0], in.q.shape[1]});
  const TensorView workspace = made.workspace(bytes);
  {
    const py::gil_scoped_release release;
    checked_attention_forward(in, out, lse, workspace, call.threads);
  }
  return made.results();
}

void backward(const py::args& values) {
  Arguments args("attention", values, 13 + kInputs);
  AttentionGradients gradients;
  gradients.dq = args.tensor("dq");
  gradients.dk = args.tensor("dk");
  gradients.dv = args.tensor("dv");
  gradients.dq_pos = args.tensor("dq_pos");
  gradients.dk_pos = args.tensor("dk_pos");
  gradients.dtables[0] = args.tensor("dtables[0]");
  gradients.dtables[1] = args.tensor("dtables[1]");
  gradients.dhead_scale = args.tensor("dhead_scale");
  const TensorView workspace = args.tensor("workspace");
  const TensorView out = args.tensor("out");
  const TensorView lse = args.tensor("lse");
  const TensorView dout = args.tensor("dout");
  const TensorView dlse = args.tensor("dlse");
  const Call call = read_inputs(args);
  const py::gil_scoped_release release;
  attention_backward_cpu(call.inputs, out, lse, dout, dlse, gradients, workspace, call.threads);
}

TensorView make_like(Made& made, const TensorView& x) { return x.defined() ? made.like(x) : made.none(); }

// The gradients in the order of `backward`, None of what was not given.
py::object make_backward(const py::args& values) {
  Arguments args("attention", values, 4 + kInputs, Unready::copied);
  const TensorView out = args.tensor("out");
  const TensorView lse = args.tensor("lse");
  const TensorView dout = args.rows("dout");
  const TensorView dlse = args.tensor("dlse");
  const Call call = read_inputs(args);
  const AttentionInputs& in = call.inputs;
  check_attention(in);
  const std::int64_t bytes = checked_attention_backward_workspace(in, call.threads);
  Made made;
  AttentionGradients gradients;
  gradients.dq = made.like(in.q);
  gradients.dk = made.like(in.k);
  gradients.dv = made.like(in.v);
  gradients.dq_pos = make_like(made, in.q_pos);
  gradients.dk_pos = make_like(made, in.k_pos);
  for (int t = 0; t < 2; ++t) gradients.dtables[t] = make_like(made, in.terms[t].table);
  gradients.dhead_scale = make_like(made, in.head_scale);
  check_attention_results(in, out, lse);
  check_attention_gradients(in, dout, dlse, gradients);
  const TensorView workspace = made.workspace(bytes);
  {
    const py::gil_scoped_release release;
    checked_attention_backward(in, out, lse, dout, dlse, gradients, workspace, call.threads);
  }
  return made.results();
}

std::int64_t forward_workspace(const py::args& values) {
  Arguments args("attention", values, kInputs);
  const Call call = read_inputs(args);
  return attention_forward_workspace(call.inputs, call.threads);
}

std::int64_t backward_workspace(const py::args& values) {
  Arguments args("attention", values, kInputs);
  const Call call = read_inputs(args);
  return attention_backward_workspace(call.inputs, call.threads);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", &make_forward);
  m.def("attention_gradients", &make_backward);
  m.def("attention_forward", &forward);
  m.def("attention_backward", &backward);
  m.def("attention_forward_workspace", &forward_workspace);
  m.def("attention_backward_workspace", &backward_workspace);
}

}  // namespace ofakern

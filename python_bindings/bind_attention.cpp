// ops.attention: every argument becomes a checked view with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "ops/attention/attention_checked.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr const char* kWhere = "attention";
constexpr Checker kCheck(kWhere);
constexpr std::size_t kInputs = 25;  // what read_inputs takes, threads included

constexpr const char* kTables[2] = {"tables[0]", "tables[1]"};

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
  static constexpr const char* kTerms[2][4] = {{kTables[0], "terms[0].q_coord", "terms[0].k_coord", "terms[0].same"},
                                               {kTables[1], "terms[1].q_coord", "terms[1].k_coord", "terms[1].same"}};
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

bool same_memory(const TensorView& a, const TensorView& b) {
  const auto same = [](const std::int64_t* x, const std::int64_t* y, int n) { return std::equal(x, x + n, y); };
  return a.data == b.data && a.ndim == b.ndim && a.dtype == b.dtype && a.device == b.device &&
         same(a.shape, b.shape, std::max(a.ndim, 0)) && same(a.stride, b.stride, std::max(a.ndim, 0));
}

// A layout whose values have been read and checked, which its calls then spare.
class CheckedLayout {
 public:
  // tensors: q_coord, k_coord and same of two terms, then the layout's own, as read_inputs takes them. rows: of the
  // tables, -1 where there is no such term; q_rows, k_rows: of q_pos and k_pos where samples share positions.
  CheckedLayout(py::tuple tensors, std::int64_t rows0, std::int64_t rows1, std::int64_t q_rows, std::int64_t k_rows)
      : tensors_(std::move(tensors)), rows_{rows0, rows1}, q_rows_(q_rows), k_rows_(k_rows) {
    if (tensors_.size() != kTensors) throw py::type_error("attention: a layout has 13 tensors");
    look_at_all();
  }

  // Its views; the call's other arguments are not given. Torch moves the memory of a tensor that it shares with another
  // process: what is no longer where it was is checked again. Tensors in one piece of memory move together.
  const AttentionInputs& look() {
    const TensorView now = memory_of(kWhere, "layout.q_offsets", tensors_[kOffsets]);
    const bool unmoved = checked_ && together_ && now.data == inputs_.layout.q_offsets.data;
    if (!unmoved) look_at_all();
    return inputs_;
  }

  // What of a call only its layout knows.
  void check(const AttentionInputs& in) const {
    for (int t = 0; t < 2; ++t) {
      const TensorView& table = in.terms[t].table;
      if (rows_[t] < 0)
        kCheck.absent(kTables[t], table, "where the layout has no such term");
      else
        kCheck.shape(kTables[t], table, "[H, R]", {-1, rows_[t]});
    }
    if (!in.layout.shared.sets.defined() || !in.q_pos.defined()) return;
    kCheck.shape("q_pos", in.q_pos, "[rows, H, P]", {q_rows_, -1, -1});
    kCheck.shape("k_pos", in.k_pos, "[rows, Hk, P]", {k_rows_, -1, -1});
  }

 private:
  static constexpr std::size_t kTensors = 13, kOffsets = 7;

  void look_at_all() {
    static constexpr const char* kNames[kTensors] = {
        "terms[0].q_coord", "terms[0].k_coord", "terms[0].same",    "terms[1].q_coord", "terms[1].k_coord",
        "terms[1].same",    "layout.visible",   "layout.q_offsets", "layout.k_offsets", "layout.key_seen",
        "layout.k_range",   "shared.sets",      "shared.members"};
    AttentionLayoutView& own = inputs_.layout;
    TensorView* const views[kTensors] = {&inputs_.terms[0].q_coord,
                                         &inputs_.terms[0].k_coord,
                                         &inputs_.terms[0].same,
                                         &inputs_.terms[1].q_coord,
                                         &inputs_.terms[1].k_coord,
                                         &inputs_.terms[1].same,
                                         &own.visible,
                                         &own.q_offsets,
                                         &own.k_offsets,
                                         &own.key_seen,
                                         &own.k_range,
                                         &own.shared.sets,
                                         &own.shared.members};
    for (std::size_t n = 0; n < kTensors; ++n) {
      const TensorView now = memory_of(kWhere, kNames[n], tensors_[n]);
      if (same_memory(now, *views[n])) continue;
      checked_ = false;
      *views[n] = now;
    }
    if (checked_) return;
    check_attention_layout(own, own.visible.shape[0], own.key_seen.shape[0], q_rows_, k_rows_);
    together_ = in_one_piece();
    checked_ = true;
  }

  bool in_one_piece() const {
    const auto memory = [this](std::size_t n) {
      return tensors_[n].attr("untyped_storage")().attr("data_ptr")().cast<std::uintptr_t>();
    };
    for (std::size_t n = 0; n < kTensors; ++n)
      if (!tensors_[n].is_none() && memory(n) != memory(kOffsets)) return false;
    return true;
  }

  py::tuple tensors_;
  AttentionInputs inputs_ = {};
  std::int64_t rows_[2], q_rows_, k_rows_;
  bool checked_ = false;   // its values
  bool together_ = false;  // all in the memory of q_offsets
};

constexpr const char* kLayout = "ofakern.CheckedLayout";

// What calls of one layout take in its place; not for pickles.
py::object check_layout_once(const py::tuple& tensors, std::int64_t rows0, std::int64_t rows1, std::int64_t q_rows,
                             std::int64_t k_rows) {
  auto layout = std::make_unique<CheckedLayout>(tensors, rows0, rows1, q_rows, k_rows);
  return py::capsule(layout.release(), kLayout, [](PyObject* capsule) {
    delete static_cast<CheckedLayout*>(PyCapsule_GetPointer(capsule, kLayout));
  });
}

double read_scale(PyObject* scale, const TensorView& q) {
  if (scale == Py_None) return std::pow(static_cast<double>(q.shape[2]), -0.5);
  const double value = PyFloat_AsDouble(scale);
  if (value != -1.0 || PyErr_Occurred() == nullptr) return value;
  PyErr_Clear();
  kCheck.fail_type("scale", "be a float", Py_TYPE(scale)->tp_name);
}

// Subclasses of tensors have a say in what is done with them.
void check_plain(PyObject* object) {
  static PyTypeObject* const types[] = {
      reinterpret_cast<PyTypeObject*>(py::module_::import("torch").attr("Tensor").cast<py::object>().release().ptr()),
      reinterpret_cast<PyTypeObject*>(
          py::module_::import("torch").attr("nn").attr("Parameter").cast<py::object>().release().ptr())};
  PyTypeObject* const type = Py_TYPE(object);
  if (type != types[0] && type != types[1] && object != Py_None)
    kCheck.fail_type("every input", "be a plain tensor", type->tp_name);
}

// What read_leaves takes: 8 leaves and the seed, dropout_p, threads, the scale (None: of q's width) and the layout.
constexpr std::size_t kLeaves = 13, kDifferentiable = 8, kLeafTensors = 9;

PyObject* item(const py::args& values, std::size_t n) {
  return PyTuple_GET_ITEM(values.ptr(), static_cast<py::ssize_t>(n));
}

bool needs_gradient(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  if (tensor == Py_None) return false;
  const py::object needs = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name));
  if (!needs) throw py::error_already_set();
  return needs.ptr() == Py_True;
}

// A call whose layout is known, from argument `first` on; checked.
Call read_leaves(Arguments& args, const py::args& values, std::size_t first) {
  Call call;
  AttentionInputs& in = call.inputs;
  auto* const layout = static_cast<CheckedLayout*>(PyCapsule_GetPointer(item(values, first + kLeaves - 1), kLayout));
  if (layout == nullptr) throw py::error_already_set();
  in = layout->look();
  in.q = args.rows("q");
  in.k = args.rows("k");
  in.v = args.rows("v");
  in.q_pos = args.rows("q_pos");
  in.k_pos = args.rows("k_pos");
  for (int t = 0; t < 2; ++t) in.terms[t].table = args.tensor(kTables[t]);
  in.head_scale = args.tensor("head_scale");
  in.dropout_seed = args.tensor("dropout_seed");
  in.dropout_p = args.real("dropout_p");
  call.threads = args.threads();
  kCheck.given("q", in.q);
  kCheck.ndim("q", in.q, 3, "[Nq, H, K]");
  in.scale = read_scale(item(values, first + kLeaves - 2), in.q);
  check_attention_shapes(in);
  layout->check(in);
  return call;
}

void forward(const py::args& values) {
  Arguments args(kWhere, values, 3 + kInputs);
  const TensorView out = args.tensor("out");
  const TensorView lse = args.tensor("lse");
  const TensorView workspace = args.tensor("workspace");
  const Call call = read_inputs(args);
  const py::gil_scoped_release release;
  attention_forward_cpu(call.inputs, out, lse, workspace, call.threads);
}

// Of a checked call: q and v have 3 dimensions. out and lse, or out alone; lse then goes into the scratch.
py::object run_forward(const Call& call, bool want_lse) {
  const AttentionInputs& in = call.inputs;
  const std::int64_t bytes = checked_attention_forward_workspace(in, call.threads);
  Made made;
  const TensorView out = made.empty(in.q.dtype, {in.q.shape[0], in.q.shape[1], in.v.shape[2]});
  TensorView lse, workspace;
  if (want_lse) {
    lse = made.empty(DType::f32, {in.q.shape[0], in.q.shape[1]});
    workspace = made.workspace(bytes);
  } else {
    const std::int64_t lse_bytes = in.q.shape[0] * in.q.shape[1] * size_of(DType::f32);
    workspace = made.workspace(bytes + lse_bytes);
    lse = row_major_view(workspace.as<char>() + bytes, DType::f32, {in.q.shape[0], in.q.shape[1]});
  }
  {
    const py::gil_scoped_release release;
    checked_attention_forward(in, out, lse, workspace, call.threads);
  }
  return made.results();
}

py::object make_forward(const py::args& values) {
  Arguments args(kWhere, values, kInputs, Unready::copied);
  const Call call = read_inputs(args);
  check_attention(call.inputs);
  return run_forward(call, true);
}

// Past torch's dispatcher. The last two arguments are flags: True instead of results where a leaf asks for a gradient;
// lse beside out.
py::object make_forward_of(const py::args& values) {
  Arguments args(kWhere, values, kLeaves + 2, Unready::copied);
  for (std::size_t n = 0; n < kLeafTensors; ++n) check_plain(item(values, n));
  if (item(values, kLeaves) == Py_True)
    for (std::size_t n = 0; n < kDifferentiable; ++n)
      if (needs_gradient(item(values, n))) return py::bool_(true);
  return run_forward(read_leaves(args, values, 0), item(values, kLeaves + 1) == Py_True);
}

void backward(const py::args& values) {
  Arguments args(kWhere, values, 13 + kInputs);
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

// What the forward pass made, and the gradients of that.
struct Results {
  TensorView out, lse, dout, dlse;

  explicit Results(Arguments& args)
      : out(args.tensor("out")), lse(args.tensor("lse")), dout(args.rows("dout")), dlse(args.tensor("dlse")) {}
};

// Of a checked call: the gradients in the order of `backward`, None of what was not given.
py::object run_backward(const Call& call, const Results& results) {
  const AttentionInputs& in = call.inputs;
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
  check_attention_results(in, results.out, results.lse);
  check_attention_gradients(in, results.dout, results.dlse, gradients);
  const TensorView workspace = made.workspace(bytes);
  {
    const py::gil_scoped_release release;
    checked_attention_backward(in, results.out, results.lse, results.dout, results.dlse, gradients, workspace,
                               call.threads);
  }
  return made.results();
}

py::object make_backward(const py::args& values) {
  Arguments args(kWhere, values, 4 + kInputs, Unready::copied);
  const Results results(args);
  const Call call = read_inputs(args);
  check_attention(call.inputs);
  return run_backward(call, results);
}

py::object make_backward_of(const py::args& values) {
  Arguments args(kWhere, values, 4 + kLeaves, Unready::copied);
  for (std::size_t n = 0; n < 4 + kLeafTensors; ++n) check_plain(item(values, n));
  const Results results(args);
  return run_backward(read_leaves(args, values, 4), results);
}

// A call past pybind11's dispatcher, which takes as long as all else around a small one. What is refused gives None:
// the checked way has words for it, or a cast.
template <py::object (*call)(const py::args&)>
PyObject* call_quickly(PyObject*, PyObject* values) noexcept {
  try {
    return call(py::reinterpret_borrow<py::args>(values)).release().ptr();
  } catch (const Error&) {
    Py_RETURN_NONE;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <py::object (*call)(const py::args&)>
void define_quick(py::module_& m, const char* name) {
  static PyMethodDef definition = {name, &call_quickly<call>, METH_VARARGS, nullptr};
  m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_New(&definition, nullptr));
}

std::int64_t forward_workspace(const py::args& values) {
  Arguments args(kWhere, values, kInputs);
  const Call call = read_inputs(args);
  return attention_forward_workspace(call.inputs, call.threads);
}

std::int64_t backward_workspace(const py::args& values) {
  Arguments args(kWhere, values, kInputs);
  const Call call = read_inputs(args);
  return attention_backward_workspace(call.inputs, call.threads);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", &make_forward);
  m.def("attention_gradients", &make_backward);
  m.def("attention_layout", &check_layout_once);
  define_quick<&make_forward_of>(m, "attention_of");
  define_quick<&make_backward_of>(m, "attention_gradients_of");
  m.def("attention_forward", &forward);
  m.def("attention_backward", &backward);
  m.def("attention_forward_workspace", &forward_workspace);
  m.def("attention_backward_workspace", &backward_workspace);
}

}  // namespace ofakern

// ops.decode_layers: weights are bound once, in an object that keeps them alive; a step's arguments become checked
// views with the GIL held, the kernel runs without it.
#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "ops/decode_layers/decode_layers.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace py = pybind11;

namespace ofakern {
namespace {

constexpr const char* kWhere = "decode_layers";
constexpr std::size_t kInputs = 9;          // what read_inputs takes, threads included
constexpr std::size_t kTensorsOfCache = 5;  // own keys and values, source keys and values, runs

struct PreparedLayers {
  std::vector<StepLayer> layers;
  StepModel model;
  py::object kept;  // the tensors that the views borrow from
};

// A layer's parts, in the order in which ofakern/ops/decode_layers/op.py lists them.
class Parts {
 public:
  explicit Parts(const py::tuple& parts) : parts_(parts) {}

  StepProjection projection(const char* name) {
    StepProjection p;
    p.packed = tensor(name);
    p.scale = tensor(name);
    p.bias = tensor(name);
    return p;
  }
  StepNorm norm(const char* name) {
    StepNorm n;
    n.weight = tensor(name);
    n.bias = tensor(name);
    n.eps = real();
    return n;
  }
  TensorView tensor(const char* name) { return view_of(kWhere, name, next()); }
  double real() { return py::cast<double>(next()); }

 private:
  py::handle next() {
    if (position_ >= parts_.size()) throw py::type_error("decode_layers: a layer has too few parts");
    return PyTuple_GET_ITEM(parts_.ptr(), static_cast<py::ssize_t>(position_++));
  }

  const py::tuple& parts_;
  std::size_t position_ = 0;
};

StepLayer read_layer(const py::tuple& tuple) {
  Parts parts(tuple);
  StepLayer layer;
  layer.own = parts.projection("own");
  layer.own_out = parts.projection("own_out");
  layer.cross = parts.projection("cross");
  layer.cross_out = parts.projection("cross_out");
  layer.fc1 = parts.projection("fc1");
  layer.fc2 = parts.projection("fc2");
  layer.own_norm = parts.norm("own_norm");
  layer.own_extra = parts.norm("own_extra");
  layer.cross_norm = parts.norm("cross_norm");
  layer.cross_extra = parts.norm("cross_extra");
  layer.final_norm = parts.norm("final_norm");
  layer.ffn_norm = parts.norm("ffn_norm");
  layer.own_heads = parts.tensor("own_heads");
  layer.cross_heads = parts.tensor("cross_heads");
  layer.residual = parts.tensor("residual");
  layer.own_scale = parts.real();
  layer.cross_scale = parts.real();
  return layer;
}

std::unique_ptr<PreparedLayers> prepare(const py::list& layers, const py::tuple& finish, const py::handle& like,
                                        std::int64_t width, std::int64_t hidden, std::int64_t heads, bool norm_first,
                                        bool gelu) {
  auto prepared = std::make_unique<PreparedLayers>();
  for (const py::handle layer : layers)
    prepared->layers.push_back(read_layer(py::reinterpret_borrow<py::tuple>(layer)));
  StepModel& model = prepared->model;
  model.layers = prepared->layers.data();
  model.count = static_cast<std::int64_t>(prepared->layers.size());
  model.width = width;
  model.hidden = hidden;
  model.heads = heads;
  const TensorView x = view_of(kWhere, "x", like);
  const Checker check(kWhere);
  check.given("x", x);
  check.dtype("x", x, {DType::f32, DType::bf16, DType::f16});
  model.dtype = x.dtype;
  model.norm_first = norm_first;
  model.gelu = gelu;
  model.finish = Parts(finish).norm("finish");
  check_step_model(model);
  prepared->kept = py::make_tuple(py::list(layers), finish);
  return prepared;
}

struct Inputs {
  StepInputs step;
  std::vector<StepCaches> caches;
};

void read_inputs(const PreparedLayers& prepared, Arguments& args, Inputs* in) {
  in->step.x = args.tensor("x");
  const std::vector<TensorView> caches = args.tensors("caches");
  const auto count = static_cast<std::size_t>(prepared.model.count);
  Checker(kWhere).that(caches.size() == count * kTensorsOfCache, "caches",
                       "be " + std::to_string(kTensorsOfCache) + " tensors of each layer",
                       std::to_string(caches.size()));
  for (std::size_t l = 0; l < count; ++l) {
    const TensorView* const own = caches.data() + l * kTensorsOfCache;
    in->caches.push_back({own[0], own[1], own[2], own[3], own[4]});
  }
  in->step.caches = in->caches.data();
  in->step.row_offsets = args.tensor("row_offsets");
  in->step.slots = args.tensor("slots");
  in->step.table = args.rows("table");
  in->step.counts = args.tensor("counts");
  in->step.own_bias = args.tensor("own_bias");
  in->step.cross_bias = args.rows("cross_bias");
}

std::int64_t workspace_bytes(const PreparedLayers& prepared, const py::args& values) {
  Arguments args(kWhere, values, kInputs);
  Inputs in;
  read_inputs(prepared, args, &in);
  return decode_layers_workspace(prepared.model, in.step, args.threads());
}

void forward(const PreparedLayers& prepared, const py::args& values) {
  Arguments args(kWhere, values, 2 + kInputs);
  const TensorView out = args.tensor("out"), workspace = args.tensor("workspace");
  Inputs in;
  read_inputs(prepared, args, &in);
  const int threads = args.threads();
  const py::gil_scoped_release release;
  decode_layers_cpu(prepared.model, in.step, out, workspace, threads);
}

// The caches are written: a copy that took one's place would be lost, so nothing is copied.
py::object make_forward(const PreparedLayers& prepared, const py::args& values) {
  Arguments args(kWhere, values, kInputs);
  Inputs in;
  read_inputs(prepared, args, &in);
  const int threads = args.threads();
  const std::int64_t bytes = decode_layers_workspace(prepared.model, in.step, threads);
  Made made;
  const TensorView out = made.like(in.step.x), workspace = made.workspace(bytes);
  {
    const py::gil_scoped_release release;
    decode_layers_cpu(prepared.model, in.step, out, workspace, threads);
  }
  return made.results();
}

}  // namespace

void bind_decode_layers(py::module_& m) {
  py::class_<PreparedLayers>(m, "PreparedLayers", py::module_local());
  m.def("decode_layers_prepare", &prepare);
  m.def("decode_layers", &make_forward);
  m.def("decode_layers_workspace", &workspace_bytes);
  m.def("decode_layers_forward", &forward);
}

}  // namespace ofakern

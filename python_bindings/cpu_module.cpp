// ofakern._cpu: the instruction set and the ops that run on a CPU. Signatures: ofakern/_cpu.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/isa.h"
#include "core/kept_memory.h"
#include "tensor_caster.h"
#include "torch_tensors.h"

namespace ofakern {
void bind_attention(pybind11::module_& m);
void bind_beam_step(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_log_mel(pybind11::module_& m);
void bind_patch_embed(pybind11::module_& m);
void bind_layer_norm(pybind11::module_& m);
void bind_rms_norm(pybind11::module_& m);
void bind_rotation_6d(pybind11::module_& m);
void bind_decode_attention(pybind11::module_& m);
void bind_decode_layers(pybind11::module_& m);
void bind_decode_linear(pybind11::module_& m);
void bind_gathered_linear(pybind11::module_& m);
void bind_routed_ffn(pybind11::module_& m);
}  // namespace ofakern

PYBIND11_MODULE(_cpu, m) {
  ofakern::register_errors();
  m.def("isa", [] { return std::string(ofakern::name_of(ofakern::active_isa())); });
  m.def("compiled_isas", &ofakern::compiled_isas);
  m.def("supported_isas", &ofakern::supported_isas);
  m.def("set_isa", &ofakern::set_isa);
  m.def("describe",
        [](pybind11::handle tensor) { return ofakern::describe(ofakern::view_of("describe", "tensor", tensor)); });
  m.def("kept_bytes", &ofakern::kept_bytes);
  m.def("kept_memory", &ofakern::kept_memory);
  m.def("keep_memory_for", &ofakern::keep_memory_for);
  m.def("give_back_memory", &ofakern::give_back_memory, pybind11::call_guard<pybind11::gil_scoped_release>());
  ofakern::bind_attention(m);
  ofakern::bind_beam_step(m);
  ofakern::bind_cross_entropy(m);
  ofakern::bind_linear(m);
  ofakern::bind_log_mel(m);
  ofakern::bind_patch_embed(m);
  ofakern::bind_layer_norm(m);
  ofakern::bind_rms_norm(m);
  ofakern::bind_rotation_6d(m);
  ofakern::bind_decode_attention(m);
  ofakern::bind_decode_layers(m);
  ofakern::bind_decode_linear(m);
  ofakern::bind_gathered_linear(m);
  ofakern::bind_routed_ffn(m);
}

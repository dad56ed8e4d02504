// The ops that have a CUDA kernel, for ofakern._cuda and for its emulated twin (tests/cuda/emulated_module.cpp).
#pragma once

#include <pybind11/pybind11.h>

namespace ofakern {

void bind_attention_cuda(pybind11::module_& m);
void bind_beam_step_cuda(pybind11::module_& m);
void bind_decode_attention_cuda(pybind11::module_& m);
void bind_log_mel_cuda(pybind11::module_& m);
void bind_patch_embed_cuda(pybind11::module_& m);
void bind_rotation_6d_cuda(pybind11::module_& m);

inline void bind_cuda_ops(pybind11::module_& m) {
  bind_attention_cuda(m);
  bind_beam_step_cuda(m);
  bind_decode_attention_cuda(m);
  bind_log_mel_cuda(m);
  bind_patch_embed_cuda(m);
  bind_rotation_6d_cuda(m);
}

}  // namespace ofakern

// From a tensor's dtype to the storage type that a kernel template takes.
#pragma once

#include "core/tensor_view.h"
#include "core/vec.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// Calls body with a value of the storage type that `dtype` names: float, bf16 or f16 (an op's .cpp has refused all
// others).
template <class Body>
OFAKERN_LOCAL auto with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(f16{});
    default:
      return body(float{});
  }
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

// A checked call of routed_ffn.h as the code of each instruction set takes it: no standard containers.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace ofakern {

struct RoutedExpert {
  const void* weight;         // [O, K]
  const void* bias;           // [O] or null
  void* dweight;              // or null
  void* dbias;                // or null
  std::int64_t first, count;  // its places
};

struct RoutedLinearCall {
  DType dtype;
  std::int64_t tokens, in, out;
  std::int64_t most;  // tokens of the largest expert
  const void* x;
  const void* dy;
  void* y;
  void* dx;
  bool wants_dx, wants_dweight;
  const std::int64_t *source, *target;
  const RoutedExpert* experts;
  std::int64_t expert_count;
};

}  // namespace ofakern

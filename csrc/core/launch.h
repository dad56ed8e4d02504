// What the GPU's and the emulator's `launch` share: a grid, a kernel's name, and what a failed launch raises.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <string>

#include "core/stream.h"

namespace ofakern::simt {

struct Grid {
  dim3 blocks, threads;
  std::size_t shared_bytes = 0;  // of dynamic shared memory
};

// "ofakern::softmax<float>" of what a compiler calls the instantiation.
template <auto kernel>
const char* kernel_text() {
  return __PRETTY_FUNCTION__;
}
std::string kernel_name(const char* text);

// A parameter that takes no part in deducing the kernel's: arguments are converted to them.
template <class T>
struct Given {
  using type = T;
};

}  // namespace ofakern::simt

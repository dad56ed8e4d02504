// What a CUDA call that failed raises, in the house's words. The same for a GPU and for the emulator.
#pragma once

#include <string>

namespace ofakern {

// `status` is a cudaError_t, `text` what the runtime says of it, `gpu` the device's name and compute capability.
// Throws BackendError where this GPU or driver cannot run the kernel, Error for everything else.
[[noreturn]] void throw_launch_error(const std::string& kernel, int status, const std::string& text,
                                     const std::string& gpu);

}  // namespace ofakern

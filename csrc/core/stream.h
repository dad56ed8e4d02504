// A CUDA stream, for headers that know no CUDA: what `cudaStream_t` points to.
#pragma once

namespace ofakern {

using Stream = void*;

}  // namespace ofakern

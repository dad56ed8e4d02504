// Large scratch memory in large pages: fewer faults when it is first touched, fewer misses of the address cache.
#pragma once

#include <cstdint>

namespace ofakern {

// Advice to the operating system about [data, data + bytes); does nothing where it has none or memory is small.
void prefer_huge_pages(void* data, std::int64_t bytes);

}  // namespace ofakern

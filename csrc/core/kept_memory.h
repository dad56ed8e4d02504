// Memory of large results, kept for a moment after its tensor is gone: the next result of that size then needs no fresh
// pages, which cost more to get from the operating system (it writes zeros first) than a kernel's pass over them.
//
// What nobody has taken again within a second goes back to the system at the next call of either function,
// and no more than kMostKept bytes wait at any time. Those that wait are the system's to take (MADV_FREE) when another
// program needs memory. Any thread may call, and so may a forked child.
#pragma once

#include <cstdint>

namespace ofakern {

constexpr std::int64_t kSmallestKept = std::int64_t{4} << 20;
constexpr std::int64_t kMostKept = std::int64_t{512} << 20;

// At least `bytes` of memory in large pages, its contents undefined; `*held` is to be given back with it. Null where
// the system has none: use another allocator.
void* take_memory(std::int64_t bytes, std::int64_t* held);
void give_memory(void* data, std::int64_t held);

// `bytes` of zeros in pages that are nobody's memory until they are written: what few rows of a large result are not.
// Never kept; null where the system has none.
void* take_zeros(std::int64_t bytes);
void drop_zeros(void* data, std::int64_t bytes);

// Bytes that wait.
std::int64_t kept_memory();
// What waits goes back to the system, and with it what the C library holds of freed memory between blocks in use.
void give_back_memory();
// How long memory waits from now on; 0: not at all, and what waits goes back. Returns how long it was.
double keep_memory_for(double seconds);

}  // namespace ofakern

#include "core/kept_memory.h"

#if defined(__linux__)
#include <malloc.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#endif

namespace ofakern {

#if defined(__linux__)
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kLargePage = std::int64_t{2} << 20;
constexpr int kPlaces = 64;

struct Kept {
  void* data;
  std::int64_t bytes;
  Clock::time_point since;
};

// Whoever finds the list in use does without it: nobody waits, and a child that was forked while another thread used
// it does not hang.
std::atomic_flag in_use = ATOMIC_FLAG_INIT;
Kept list[kPlaces];  // the oldest first
int count = 0;
std::atomic<double> kept_seconds{1.0};

class Use {
 public:
  Use() : granted(!in_use.test_and_set(std::memory_order_acquire)) {}
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;
  ~Use() {
    if (granted) in_use.clear(std::memory_order_release);
  }
  const bool granted;
};

void unmap(void* data, std::int64_t bytes) {
  if (bytes > 0) munmap(data, static_cast<std::size_t>(bytes));
}

Kept remove(int place) {
  const Kept taken = list[place];
  --count;
  for (int n = place; n < count; ++n) list[n] = list[n + 1];
  return taken;
}

std::int64_t waiting() {
  std::int64_t bytes = 0;
  for (int n = 0; n < count; ++n) bytes += list[n].bytes;
  return bytes;
}

// What has waited too long, and the oldest until there is room for `bytes` more in as many `places`.
void make_room(std::int64_t bytes, int places) {
  const Clock::time_point now = Clock::now();
  while (count > 0 && (std::chrono::duration<double>(now - list[0].since).count() > kept_seconds ||
                       waiting() + bytes > kMostKept || count + places > kPlaces)) {
    const Kept oldest = remove(0);
    unmap(oldest.data, oldest.bytes);
  }
}

void* fresh_memory(std::int64_t bytes) {
  void* const mapped = mmap(nullptr, static_cast<std::size_t>(bytes + kLargePage), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapped);
  const std::int64_t skipped = (kLargePage - reinterpret_cast<std::intptr_t>(begin) % kLargePage) % kLargePage;
  char* const data = begin + skipped;
  unmap(begin, skipped);
  unmap(data + bytes, kLargePage - skipped);
  (void)madvise(data, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);  // only advice: nothing is lost if it is refused
  return data;
}

}  // namespace

void* take_memory(std::int64_t bytes, std::int64_t* held) {
  *held = (bytes + kLargePage - 1) / kLargePage * kLargePage;
  if (const Use use; use.granted) {
    make_room(0, 0);
    for (int n = count - 1; n >= 0; --n) {  // the youngest first: a cache may still have some of it
      if (list[n].bytes < *held || list[n].bytes > *held + *held / 8) continue;
      const Kept found = remove(n);
      *held = found.bytes;
      return found.data;
    }
  }
  return fresh_memory(*held);
}

void give_memory(void* data, std::int64_t held) {
  const Use use;
  if (!use.granted || held > kMostKept || kept_seconds == 0.0) return unmap(data, held);
  make_room(held, 1);
  (void)madvise(data, static_cast<std::size_t>(held), MADV_FREE);
  list[count++] = {data, held, Clock::now()};
}

void* take_zeros(std::int64_t bytes) {
  void* const data = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  (void)madvise(data, static_cast<std::size_t>(bytes), MADV_NOHUGEPAGE);  // one row would fill 2 MiB
  return data;
}

void drop_zeros(void* data, std::int64_t bytes) { unmap(data, bytes); }

std::int64_t kept_memory() {
  const Use use;
  return use.granted ? waiting() : 0;
}

void give_back_memory() {
  if (const Use use; use.granted) make_room(kMostKept, 0);
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

double keep_memory_for(double seconds) {
  const double before = kept_seconds.exchange(seconds);
  if (const Use use; use.granted) make_room(seconds > 0.0 ? 0 : kMostKept, 0);
  return before;
}

#else

void* take_memory(std::int64_t, std::int64_t*) { return nullptr; }
void give_memory(void*, std::int64_t) {}
void* take_zeros(std::int64_t) { return nullptr; }
void drop_zeros(void*, std::int64_t) {}
std::int64_t kept_memory() { return 0; }
void give_back_memory() {}
double keep_memory_for(double) { return 0.0; }

#endif

}  // namespace ofakern

// The emulator of simt_host.h: fibers, where they meet, shared memory, and the instructions that a warp does together.
#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/cuda_error.h"
#include "core/simt.h"

namespace ofakern::simt::host {
namespace {

constexpr int kMaxThreads = 1024;
constexpr std::size_t kStackBytes = std::size_t{256} << 10;
constexpr std::size_t kMaxStatic = std::size_t{48} << 10;   // as CUDA allows
constexpr std::size_t kMaxShared = std::size_t{227} << 10;  // of a block, sm_90 and sm_100
constexpr std::size_t kGuard = 1024;                        // bytes behind shared memory that must stay as they are
constexpr unsigned char kPoison = 0xFF;                     // a NaN in every type

// ---- fibers ---------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" void ofakern_simt_switch(void** save, void* to);
// What the System V ABI has a callee keep, on the stack that is left.
asm(R"(
    .text
    .globl ofakern_simt_switch
    .hidden ofakern_simt_switch
    .type ofakern_simt_switch, @function
ofakern_simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size ofakern_simt_switch, . - ofakern_simt_switch
)");

struct Context {
  void* stack_pointer = nullptr;
  void begin(std::byte* stack, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(stack + kStackBytes);
    top[-1] = nullptr;  // where `entry` would return to: it never does
    top[-2] = reinterpret_cast<void*>(entry);
    for (int n = 3; n <= 8; ++n) top[-n] = nullptr;
    stack_pointer = top - 8;
  }
  void leave_for(Context& other) { ofakern_simt_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t of;
  void begin(std::byte* stack, void (*entry)()) {
    getcontext(&of);
    of.uc_stack.ss_sp = stack;
    of.uc_stack.ss_size = kStackBytes;
    of.uc_link = nullptr;
    makecontext(&of, entry, 0);
  }
  void leave_for(Context& other) { swapcontext(&of, &other.of); }
};
#endif

// A page that must not be touched lies below each stack. They are kept for the life of the process.
std::byte* make_stack() {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* const all = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED || mprotect(all, page, PROT_NONE) != 0) throw Error("emulator: no memory for a thread's stack");
  return static_cast<std::byte*>(all) + page;
}

// ---- a block --------------------------------------------------------------------------------------------------------

struct Copy {
  void* shared;
  const void* global;
  std::size_t bytes;
  int group;
};

struct Fiber {
  Context context;
  std::byte* stack = nullptr;
  int index = 0;
  bool finished = false;
  Site site{};
  std::vector<Copy> copies;
  int groups = 0;  // of copies, closed
};

struct Meeting {
  int arrived = 0;
  Site site{};
  void* given[32] = {};
};

struct Machine {
  std::mutex one_launch;
  std::uint64_t seed = 1, random = 1;
  int failing = 0;  // a cudaError_t
  std::string kernel, failure;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  int threads = 0, finished = 0;
  std::size_t dynamic_bytes = 0, static_used = 0;
  Context scheduler;
  Fiber* current = nullptr;
  std::vector<Fiber*> runnable;
  Meeting block, warps[kMaxThreads / 32];
  std::map<const void*, std::byte*> arrays;
  std::unique_ptr<Fiber[]> fibers{new Fiber[kMaxThreads]};
  alignas(128) std::byte dynamic[kMaxShared + kGuard];
  alignas(128) std::byte statics[2 * kMaxStatic];
};
Machine& machine() {
  static auto* const only = new Machine();
  return *only;
}

std::uint64_t draw(Machine& m) {
  m.random ^= m.random << 13;
  m.random ^= m.random >> 7;
  m.random ^= m.random << 17;
  return m.random;
}

std::string file_name(const char* path) {
  const std::string all(path);
  return all.substr(all.rfind('/') + 1);
}

std::string text_of(const Site& site) {
  return std::string(site.what) + " (" + file_name(site.file) + ":" + std::to_string(site.line) + ")";
}

std::string thread_name(int index) {
  return "thread " + std::to_string(index) + " of block (" + std::to_string(blockIdx.x) + ", " +
         std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
}

// Ends the launch: no fiber runs again.
[[noreturn]] void fail(const std::string& what) {
  Machine& m = machine();
  m.failure = what;
  m.current->context.leave_for(m.scheduler);
  __builtin_unreachable();
}

void check_place(const Site& site, const void* p, std::size_t bytes, std::size_t alignment) {
  const Machine& m = machine();
  const auto* at = static_cast<const std::byte*>(p);
  const bool dynamic = at >= m.dynamic && at + bytes <= m.dynamic + m.dynamic_bytes;
  const bool fixed = at >= m.statics && at + bytes <= m.statics + m.static_used;
  if (!dynamic && !fixed) fail(text_of(site) + " goes beyond the block's shared memory");
  if (reinterpret_cast<std::uintptr_t>(p) % alignment != 0)
    fail(text_of(site) + " has a shared address that is no multiple of " + std::to_string(alignment));
}

bool same(const Site& a, const Site& b) { return a.line == b.line && a.what == b.what && a.file == b.file; }

// The next fiber to run is drawn by the scheduler.
void wait(const Site& site) {
  Machine& m = machine();
  m.current->site = site;
  m.current->context.leave_for(m.scheduler);
}

void join(Meeting& meeting, const Site& site, const char* group) {
  const Machine& m = machine();
  if (meeting.arrived == 0) {
    meeting.site = site;
  } else if (!same(meeting.site, site)) {
    fail(thread_name(m.current->index) + " reached " + text_of(site) + " where others of its " + group + " wait at " +
         text_of(meeting.site));
  }
  ++meeting.arrived;
}

void release(int first, int count) {
  Machine& m = machine();
  for (int n = first; n < first + count; ++n) m.runnable.push_back(&m.fibers[n]);
}

void thread_entry() {
  Machine& m = machine();
  m.body(m.arguments);
  m.current->finished = true;
  ++m.finished;
  m.current->context.leave_for(m.scheduler);
}

// "3 have ended, 29 wait at sync_block (f.cu:7)"
std::string who_waits(const Machine& m) {
  std::map<std::string, int> counts;
  for (int t = 0; t < m.threads; ++t)
    if (!m.fibers[t].finished) ++counts[text_of(m.fibers[t].site)];
  std::string text = std::to_string(m.finished) + " threads have ended";
  for (const auto& [site, count] : counts) text += ", " + std::to_string(count) + " wait at " + site;
  return text;
}

[[noreturn]] void raise(const Machine& m, const std::string& what) {
  throw Error("CUDA kernel " + m.kernel + ": " + what);
}

bool untouched(const std::byte* from, std::size_t bytes) {
  for (std::size_t n = 0; n < bytes; ++n)
    if (from[n] != std::byte{kPoison}) return false;
  return true;
}

void check_guards(const Machine& m) {
  if (!untouched(m.dynamic + m.dynamic_bytes, kGuard)) raise(m, "wrote beyond its dynamic shared memory");
  if (!untouched(m.statics + m.static_used, kGuard)) raise(m, "wrote beyond its static shared memory");
}

void begin_block(Machine& m) {
  m.finished = 0;
  m.static_used = 0;
  m.arrays.clear();
  m.block = Meeting();
  for (Meeting& warp : m.warps) warp = Meeting();
  std::memset(m.dynamic, kPoison, m.dynamic_bytes + kGuard);
  std::memset(m.statics, kPoison, sizeof(m.statics));
  m.runnable.clear();
  for (int t = 0; t < m.threads; ++t) {
    Fiber& fiber = m.fibers[t];
    if (fiber.stack == nullptr) fiber.stack = make_stack();
    fiber.index = t;
    fiber.finished = false;
    fiber.copies.clear();
    fiber.groups = 0;
    fiber.context.begin(fiber.stack, &thread_entry);
    m.runnable.push_back(&fiber);
  }
}

void run_block(Machine& m) {
  begin_block(m);
  while (!m.runnable.empty()) {
    std::swap(m.runnable[draw(m) % m.runnable.size()], m.runnable.back());
    m.current = m.runnable.back();
    m.runnable.pop_back();
    threadIdx.x = static_cast<unsigned>(m.current->index);
    m.scheduler.leave_for(m.current->context);
    if (!m.failure.empty()) raise(m, m.failure);
  }
  if (m.finished != m.threads)
    raise(m, "some threads wait for ever in " + thread_name(0).substr(9) + ": " + who_waits(m));
  check_guards(m);
}

void check_grid(const Machine& m, const Grid& grid) {
  const dim3 &b = grid.blocks, &t = grid.threads;
  if (t.y != 1 || t.z != 1 || t.x == 0 || t.x % 32 != 0 || t.x > kMaxThreads)
    raise(m, "a block must have 32 to 1024 threads in x, a multiple of 32, got (" + std::to_string(t.x) + ", " +
                 std::to_string(t.y) + ", " + std::to_string(t.z) + ")");
  if (b.x == 0 || b.y == 0 || b.z == 0 || b.x > 0x7FFFFFFFu || b.y > 65535 || b.z > 65535)
    raise(m, "a grid must have at least one block, and at most 65535 in y and z, got (" + std::to_string(b.x) + ", " +
                 std::to_string(b.y) + ", " + std::to_string(b.z) + ")");
  if (grid.shared_bytes > kMaxShared)
    raise(m, "dynamic shared memory must be at most 227 KiB, got " + std::to_string(grid.shared_bytes) + " bytes");
}

// A 16-bit number's value.
template <class T>
float number(std::uint16_t bits) {
  if constexpr (std::is_same_v<T, __half>) return __half2float(__ushort_as_half(bits));
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(__ushort_as_bfloat16(bits));
}

template <class T>
float half_of(unsigned pair, int high) {
  return number<T>(static_cast<std::uint16_t>(high ? pair >> 16 : pair));
}

struct Product {
  float* d;
  const unsigned *a, *b;
};

// mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): lane = 4 g + t holds of A the rows g and g + 8, of B the
// column g, each the pairs at 2 t and 2 t + 8; of D the columns 2 t and 2 t + 1.
template <class T>
void multiply(void* const* lanes) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    const Product& mine = *static_cast<const Product*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int e = 0; e < 2; ++e) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + e] = half_of<T>(mine.a[r], e);
      for (int r = 0; r < 2; ++r) b[2 * t + 8 * r + e][g] = half_of<T>(mine.b[r], e);
    }
  }
  for (int l = 0; l < 32; ++l) {
    float* const d = static_cast<const Product*>(lanes[l])->d;
    for (int r = 0; r < 4; ++r) {
      const int row = l / 4 + 8 * (r / 2), column = 2 * (l % 4) + r % 2;
      float sum = d[r];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      d[r] = sum;
    }
  }
}

struct Rows {
  unsigned* r;
  const void* row;
  int count;
  bool transposed;
};

// ldmatrix: lane 4 g + t gets of every matrix the elements 2 t and 2 t + 1 of row g; transposed, of column g.
void spread(void* const* lanes) {
  const int count = static_cast<const Rows*>(lanes[0])->count;
  for (int matrix = 0; matrix < count; ++matrix) {
    std::uint16_t element[8][8];
    for (int row = 0; row < 8; ++row)
      std::memcpy(element[row], static_cast<const Rows*>(lanes[8 * matrix + row])->row, 16);
    for (int l = 0; l < 32; ++l) {
      const Rows& mine = *static_cast<const Rows*>(lanes[l]);
      const int g = l / 4, t = 2 * (l % 4);
      const std::uint16_t low = mine.transposed ? element[t][g] : element[g][t];
      const std::uint16_t high = mine.transposed ? element[t + 1][g] : element[g][t + 1];
      mine.r[matrix] = low | (static_cast<unsigned>(high) << 16);
    }
  }
}

}  // namespace

int thread_index() { return machine().current->index; }

std::byte* dynamic_memory() { return machine().dynamic; }

void* shared_array(const void* key, std::size_t bytes) {
  Machine& m = machine();
  std::byte*& array = m.arrays[key];
  if (array == nullptr) {
    array = m.statics + m.static_used;
    m.static_used += (bytes + 15) / 16 * 16;
    if (m.static_used > kMaxStatic) fail("has more than 48 KiB of static shared memory");
    if (m.static_used + m.dynamic_bytes > kMaxShared) fail("has more than 227 KiB of shared memory");
  }
  return array;
}

void meet_block(const Site& site) {
  Machine& m = machine();
  join(m.block, site, "block");
  if (m.block.arrived < m.threads) return wait(site);
  m.block.arrived = 0;
  release(0, m.threads);
  wait(site);
}

void meet_warp(const Site& site, void* mine, void (*work)(void* const*)) {
  Machine& m = machine();
  const int index = m.current->index;
  Meeting& warp = m.warps[index / 32];
  join(warp, site, "warp");
  warp.given[index % 32] = mine;
  if (warp.arrived < 32) return wait(site);
  if (work != nullptr) work(warp.given);
  warp.arrived = 0;
  release(index / 32 * 32, 32);
  wait(site);
}

void copy_later(const Site& site, void* shared, const void* global, std::size_t bytes, bool valid) {
  Fiber& fiber = *machine().current;
  check_place(site, shared, bytes, bytes);
  if (valid && reinterpret_cast<std::uintptr_t>(global) % bytes != 0)
    fail(text_of(site) + " has a global address that is no multiple of " + std::to_string(bytes));
  std::memset(shared, kPoison, bytes);
  fiber.copies.push_back({shared, valid ? global : nullptr, bytes, fiber.groups});
}

void close_copies() { ++machine().current->groups; }

void finish_copies(int groups_left) {
  Fiber& fiber = *machine().current;
  std::vector<Copy> left;
  for (const Copy& copy : fiber.copies) {
    if (copy.group >= fiber.groups - groups_left) {
      left.push_back(copy);
    } else if (copy.global == nullptr) {
      std::memset(copy.shared, 0, copy.bytes);
    } else {
      std::memcpy(copy.shared, copy.global, copy.bytes);
    }
  }
  fiber.copies.swap(left);
}

void load_matrices(const Site& site, unsigned* r, int count, const void* shared_row, bool transposed) {
  if (machine().current->index % 32 < 8 * count) check_place(site, shared_row, 16, 16);
  Rows mine{r, shared_row, count, transposed};
  meet_warp(site, &mine, &spread);
}

void multiply_bf16(const Site& site, float* d, const unsigned* a, const unsigned* b) {
  Product mine{d, a, b};
  meet_warp(site, &mine, &multiply<__nv_bfloat16>);
}

void multiply_f16(const Site& site, float* d, const unsigned* a, const unsigned* b) {
  Product mine{d, a, b};
  meet_warp(site, &mine, &multiply<__half>);
}

void run(const char* text, const Grid& grid, void (*body)(void*), void* arguments) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.one_launch);
  m.kernel = kernel_name(text);
  m.failure.clear();
  if (const int status = std::exchange(m.failing, 0))
    throw_launch_error(m.kernel, status, "emulated", "an emulated GPU");
  check_grid(m, grid);
  m.body = body;
  m.arguments = arguments;
  m.threads = static_cast<int>(grid.threads.x);
  m.dynamic_bytes = grid.shared_bytes;
  gridDim = grid.blocks;
  blockDim = grid.threads;
  threadIdx = {};
  m.random = m.seed * 0x9E3779B97F4A7C15u | 1;
  const std::uint64_t blocks = std::uint64_t{grid.blocks.x} * grid.blocks.y * grid.blocks.z;
  std::vector<std::uint64_t> order(blocks);
  for (std::uint64_t n = 0; n < blocks; ++n) {
    order[n] = n;
    std::swap(order[n], order[draw(m) % (n + 1)]);
  }
  for (const std::uint64_t n : order) {
    blockIdx.x = static_cast<unsigned>(n % grid.blocks.x);
    blockIdx.y = static_cast<unsigned>(n / grid.blocks.x % grid.blocks.y);
    blockIdx.z = static_cast<unsigned>(n / grid.blocks.x / grid.blocks.y);
    run_block(m);
  }
}

void set_seed(std::uint64_t seed) { machine().seed = seed; }

void fail_next_launch(int status) { machine().failing = status; }

}  // namespace ofakern::simt::host

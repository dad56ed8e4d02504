#include "core/isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "core/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ofakern {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_bf16", "avx512_amx"};
constexpr int kUndecided = -1;
std::atomic<int> active{kUndecided};

#if defined(__x86_64__)

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool has(std::uint32_t word, int bit) { return (word >> bit) & 1U; }

// The register state that the operating system saves on a context switch (XCR0).
std::uint64_t saved_state() {
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

// Linux gives tile registers to a process only when it asks (arch_prctl(2)).
bool tiles_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa best_supported() {
  constexpr std::uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  const Registers basic = cpuid(1, 0);
  if (!has(basic.ecx, 27)) return Isa::scalar;  // OSXSAVE
  const std::uint64_t state = saved_state();
  const Registers extended = cpuid(7, 0);
  const bool avx2 = has(basic.ecx, 28) && has(basic.ecx, 12) && has(basic.ecx, 29) &&  // AVX, FMA, F16C
                    has(extended.ebx, 5) && (state & kYmm) == kYmm;
  if (!avx2) return Isa::scalar;
  const bool avx512 = has(extended.ebx, 16) && has(extended.ebx, 17) && has(extended.ebx, 30) &&  // F, DQ, BW
                      has(extended.ebx, 31) && (state & kZmm) == kZmm;                            // VL
  if (!avx512) return Isa::avx2;
  if (!has(cpuid(7, 1).eax, 5)) return Isa::avx512;                                               // AVX512_BF16
  const bool amx = has(extended.edx, 24) && has(extended.edx, 22) && (state & kTiles) == kTiles;  // TILE, BF16
  return amx && tiles_permitted() ? Isa::avx512_amx : Isa::avx512_bf16;
}

// VDPBF16PS multiplies half as many numbers per cycle as two f32 units do on Intel's cores, twice as many on AMD's:
// with Intel and no tiles, bf16 is faster multiplied as f32.
bool slow_bf16_products() {
  const Registers vendor = cpuid(0, 0);
  return vendor.ebx == 0x756e6547 && vendor.edx == 0x49656e69 && vendor.ecx == 0x6c65746e;  // "GenuineIntel"
}

#else

Isa best_supported() { return Isa::scalar; }
bool slow_bf16_products() { return false; }

#endif

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

Isa usable(const std::string& name, const char* source) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (name != kNames[i]) continue;
    const Isa isa = static_cast<Isa>(i);
    if (!is_compiled(isa)) {
      throw BackendError(std::string(source) + ": the instruction set must be compiled into this build (" +
                         join(compiled_isas()) + "), got " + name);
    }
    if (!is_supported(isa)) {
      throw BackendError(std::string(source) + ": the instruction set must be supported by this CPU (" +
                         join(supported_isas()) + "), got " + name);
    }
    return isa;
  }
  std::string known;
  for (const char* candidate : kNames) known += (known.empty() ? "" : ", ") + std::string(candidate);
  throw BackendError(std::string(source) + ": the instruction set must be one of " + known + ", got '" + name + "'");
}

Isa choose() {
  const char* forced = std::getenv("OFAKERN_CPU_ISA");
  if (forced != nullptr && *forced != '\0') return usable(forced, "OFAKERN_CPU_ISA");
  Isa best = Isa::scalar;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (isa == Isa::avx512_bf16 && slow_bf16_products()) continue;
    if (is_compiled(isa) && is_supported(isa)) best = isa;
  }
  return best;
}

}  // namespace

const char* name_of(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool is_compiled(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return true;
      OFAKERN_IF_AVX2(case Isa::avx2 : return true;)
      OFAKERN_IF_AVX512(case Isa::avx512 : return true;)
      OFAKERN_IF_AVX512_BF16(case Isa::avx512_bf16 : return true;)
      OFAKERN_IF_AVX512_AMX(case Isa::avx512_amx : return true;)
    default:
      return false;
  }
}

bool is_supported(Isa isa) {
  static const Isa best = best_supported();
  return isa <= best;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i) {
    if (is_compiled(static_cast<Isa>(i))) names.emplace_back(kNames[i]);
  }
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i) {
    if (is_supported(static_cast<Isa>(i))) names.emplace_back(kNames[i]);
  }
  return names;
}

Isa active_isa() {
  int isa = active.load(std::memory_order_relaxed);
  if (isa == kUndecided) {
    isa = static_cast<int>(choose());
    active.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_isa(const std::string& name) {
  active.store(static_cast<int>(name.empty() ? choose() : usable(name, "set_isa")), std::memory_order_relaxed);
}

}  // namespace ofakern

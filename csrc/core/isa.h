// Which instruction set the CPU kernels use, and how an op's .cpp reaches the copy compiled for it.
//
// Every csrc/ops/<op>/<op>_cpu.cpp is compiled once per ISA with that ISA's flags and OFAKERN_ISA set to its name, and
// puts everything it defines into that namespace:
//
//     namespace ofakern::OFAKERN_ISA {                        // ofakern::scalar, ofakern::avx2, ...
//     namespace { ...helpers... }                             // internal linkage: nothing weak leaves the object
//     void attention_forward(const AttentionInputs& in, int threads) { ... }
//     }
//
// <op>.cpp, compiled at the baseline, declares that function for all of them and calls the active one:
//
//     OFAKERN_DECLARE_FOR_EACH_ISA(void attention_forward(const AttentionInputs& in, int threads);)
//     void attention_forward_cpu(const AttentionInputs& in, int threads) {
//       check(in);
//       OFAKERN_DISPATCH(attention_forward, in, threads);     // an expression: returns what the function returns
//     }
//
// ISAs that the compiler does not have are left out (OFAKERN_HAS_<ISA> is not defined) and never become active.
#pragma once

#include <string>
#include <vector>

namespace ofakern {

// In ascending order: a CPU that supports one supports those before it.
enum class Isa : int { scalar, avx2, avx512, avx512_bf16, avx512_amx };
constexpr int kIsaCount = 5;

const char* name_of(Isa isa);
bool is_compiled(Isa isa);
// CPU and operating system together; for AMX this asks Linux for permission to use tiles, once per process.
bool is_supported(Isa isa);
std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();  // by this CPU, compiled or not

// The fastest one that is compiled and supported (avx512_bf16 is passed over on Intel's cores, whose f32 products are
// twice as fast as its bf16 ones), or what OFAKERN_CPU_ISA names. Chosen on first use.
// Throws BackendError when the name is unknown, not compiled or not supported by this CPU.
Isa active_isa();
// Forces one from now on; an empty name goes back to the choice above. Throws like active_isa.
void set_isa(const std::string& name);

}  // namespace ofakern

#ifdef OFAKERN_HAS_AVX2
#define OFAKERN_IF_AVX2(...) __VA_ARGS__
#else
#define OFAKERN_IF_AVX2(...)
#endif
#ifdef OFAKERN_HAS_AVX512
#define OFAKERN_IF_AVX512(...) __VA_ARGS__
#else
#define OFAKERN_IF_AVX512(...)
#endif
#ifdef OFAKERN_HAS_AVX512_BF16
#define OFAKERN_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define OFAKERN_IF_AVX512_BF16(...)
#endif
#ifdef OFAKERN_HAS_AVX512_AMX
#define OFAKERN_IF_AVX512_AMX(...) __VA_ARGS__
#else
#define OFAKERN_IF_AVX512_AMX(...)
#endif

// At namespace ofakern scope.
#define OFAKERN_DECLARE_FOR_EACH_ISA(...)                    \
  namespace scalar {                                         \
  __VA_ARGS__                                                \
  }                                                          \
  OFAKERN_IF_AVX2(namespace avx2{__VA_ARGS__})               \
  OFAKERN_IF_AVX512(namespace avx512{__VA_ARGS__})           \
  OFAKERN_IF_AVX512_BF16(namespace avx512_bf16{__VA_ARGS__}) \
  OFAKERN_IF_AVX512_AMX(namespace avx512_amx{__VA_ARGS__})

#define OFAKERN_DISPATCH(FUNCTION, ...)                                                                                \
  [&]() -> decltype(auto) {                                                                                            \
    switch (::ofakern::active_isa()) {                                                                                 \
      OFAKERN_IF_AVX2(case ::ofakern::Isa::avx2 : return ::ofakern::avx2::FUNCTION(__VA_ARGS__);)                      \
      OFAKERN_IF_AVX512(case ::ofakern::Isa::avx512 : return ::ofakern::avx512::FUNCTION(__VA_ARGS__);)                \
      OFAKERN_IF_AVX512_BF16(case ::ofakern::Isa::avx512_bf16 : return ::ofakern::avx512_bf16::FUNCTION(__VA_ARGS__);) \
      OFAKERN_IF_AVX512_AMX(case ::ofakern::Isa::avx512_amx : return ::ofakern::avx512_amx::FUNCTION(__VA_ARGS__);)    \
      default:                                                                                                         \
        return ::ofakern::scalar::FUNCTION(__VA_ARGS__);                                                               \
    }                                                                                                                  \
  }()

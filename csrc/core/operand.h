// What an op's products multiply when their operands come straight from memory, a block at a time.
#pragma once

#include "core/gemm.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// bf16 goes through f32 where there is no AMX: measured on Sapphire Rapids, VDPBF16PS reaches 80 GFLOP/s a core and
// f32's FMA 145.
template <class T>
struct OperandOf {
  using type = float;
};
#if defined(OFAKERN_AMX)
template <>
struct OperandOf<bf16> {
  using type = bf16;
};
#endif
template <class T>
using Operand = typename OperandOf<T>::type;

}  // namespace
}  // namespace ofakern::OFAKERN_ISA

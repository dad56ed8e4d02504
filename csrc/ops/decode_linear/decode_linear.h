// Linear layers of a few rows on weights that were packed once: the contract.
//
//   out[m, n] = scale[n] * sum_k x[m, k] * weight[n, k] + bias[n]             scale is 1 but for int8 weights
//
// A packed weight is a u8 tensor: a header of 64 bytes that says what it was packed for (instruction set, dtype of x,
// int8 or not, N, K), then the panels of core/gemm_driver.h. It is read by the instruction set that wrote it only.
//
// Sums are f32. Layout, flops and floors: README.md beside this file.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace ofakern {

constexpr std::int64_t kPackedHeaderBytes = 64;

struct PackedHeader {
  char magic[8];                             // "ofakern1"
  std::int32_t isa, dtype, bytes, reserved;  // bytes: 1 when the weight is int8
  std::int64_t n, k, elements;
};

struct DecodeLinearInputs {
  TensorView x;       // [M, K], f32, bf16 or f16; rows contiguous
  TensorView packed;  // u8, from decode_linear_pack for x's dtype
  TensorView scale;   // f32 [N], for int8 weights; else undefined
  TensorView bias;    // f32 [N] or undefined
};

// Bytes of the packed form of a weight [N, K] that products with x of `dtype` use.
std::int64_t decode_linear_packed_bytes(std::int64_t n, std::int64_t k, DType dtype, bool int8);

// weight [N, K] contiguous: of `dtype`, or u8 holding the bits of int8. packed: u8, of the size above.
void decode_linear_pack(const TensorView& weight, DType dtype, const TensorView& packed, int threads);

// What a packed weight was packed for; checks all inputs against each other.
PackedHeader decode_linear_header(const DecodeLinearInputs& inputs);

std::int64_t decode_linear_workspace(const DecodeLinearInputs& inputs, int threads);

// out [M, N] of x's dtype, contiguous, fully written. The result does not depend on `threads`.
void decode_linear_cpu(const DecodeLinearInputs& inputs, const TensorView& out, const TensorView& workspace,
                       int threads);

}  // namespace ofakern

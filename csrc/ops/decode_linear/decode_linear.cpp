// Checks every argument against the contract in decode_linear.h, then calls the active instruction set's kernel.
#include "ops/decode_linear/decode_linear.h"

#include <cstring>
#include <string>

#include "core/check.h"
#include "core/isa.h"

namespace ofakern {

OFAKERN_DECLARE_FOR_EACH_ISA(std::int64_t decode_linear_elements(std::int64_t n, std::int64_t k, DType dtype);
                             void decode_linear_pack(const TensorView& weight, DType dtype, void* panels, int threads);
                             std::int64_t decode_linear_workspace(const DecodeLinearInputs& in,
                                                                  const PackedHeader& header, int threads);
                             void decode_linear(const DecodeLinearInputs& in, const PackedHeader& header,
                                                const TensorView& out, const TensorView& workspace, int threads);)

namespace {

static_assert(sizeof(PackedHeader) <= kPackedHeaderBytes, "the panels begin at the next line");
constexpr char kMagic[9] = "ofakern1";

constexpr Checker kCheck("decode_linear");

PackedHeader make_header(std::int64_t n, std::int64_t k, DType dtype, bool int8) {
  PackedHeader header = {};
  std::memcpy(header.magic, kMagic, sizeof header.magic);
  header.isa = static_cast<std::int32_t>(active_isa());
  header.dtype = static_cast<std::int32_t>(dtype);
  header.bytes = int8 ? 1 : 0;
  header.n = n;
  header.k = k;
  header.elements = OFAKERN_DISPATCH(decode_linear_elements, n, k, dtype);
  return header;
}

std::int64_t total_bytes(const PackedHeader& header) {
  return kPackedHeaderBytes + header.elements * (header.bytes ? 1 : size_of(static_cast<DType>(header.dtype)));
}

PackedHeader check_inputs(const DecodeLinearInputs& in) {
  kCheck.given("x", in.x);
  kCheck.dtype("x", in.x, {DType::f32, DType::bf16, DType::f16});
  kCheck.shape("x", in.x, "[M, K]", {-1, -1});
  kCheck.device("x", in.x, Device::cpu);
  kCheck.last_contiguous("x", in.x);
  kCheck.plain("packed", in.packed, "[bytes]", {-1}, DType::u8);
  PackedHeader header = {};
  if (in.packed.shape[0] >= kPackedHeaderBytes) std::memcpy(&header, in.packed.data, sizeof header);
  kCheck.that(std::memcmp(header.magic, kMagic, sizeof header.magic) == 0, "packed", "come from prepack_weight",
              describe(in.packed));
  if (header.isa != static_cast<std::int32_t>(active_isa()))
    kCheck.fail_value("packed", std::string("be packed for the active instruction set ") + name_of(active_isa()),
                      header.isa >= 0 && header.isa < kIsaCount ? name_of(static_cast<Isa>(header.isa)) : "another",
                      "prepack_weight again after the instruction set was changed");
  kCheck.that(header.dtype == static_cast<std::int32_t>(in.x.dtype), "packed", "be packed for x's dtype",
              "x " + describe(in.x));
  const PackedHeader expected = make_header(header.n, header.k, in.x.dtype, header.bytes != 0);
  kCheck.that(header.elements == expected.elements && in.packed.shape[0] == total_bytes(expected), "packed",
              "be whole (" + std::to_string(total_bytes(expected)) + " bytes)", describe(in.packed));
  kCheck.shape("x", in.x, "[M, K]", {-1, header.k});
  if (header.bytes)
    kCheck.plain("scale", in.scale, "[N]", {header.n}, DType::f32);
  else
    kCheck.absent("scale", in.scale, "the weight is not int8");
  if (in.bias.defined()) kCheck.plain("bias", in.bias, "[N]", {header.n}, DType::f32);
  return header;
}

}  // namespace

std::int64_t decode_linear_packed_bytes(std::int64_t n, std::int64_t k, DType dtype, bool int8) {
  kCheck.that(n > 0 && k > 0, "weight", "not be empty", std::to_string(n) + " x " + std::to_string(k));
  return total_bytes(make_header(n, k, dtype, int8));
}

void decode_linear_pack(const TensorView& weight, DType dtype, const TensorView& packed, int threads) {
  const bool int8 = weight.defined() && weight.dtype == DType::u8;
  kCheck.plain("weight", weight, "[N, K]", {-1, -1}, int8 ? DType::u8 : dtype);
  const std::int64_t bytes = decode_linear_packed_bytes(weight.shape[0], weight.shape[1], dtype, int8);
  kCheck.plain("packed", packed, "[bytes]", {bytes}, DType::u8);
  const PackedHeader header = make_header(weight.shape[0], weight.shape[1], dtype, int8);
  std::memset(packed.data, 0, kPackedHeaderBytes);
  std::memcpy(packed.data, &header, sizeof header);
  OFAKERN_DISPATCH(decode_linear_pack, weight, dtype, packed.as<char>() + kPackedHeaderBytes, threads);
}

PackedHeader decode_linear_header(const DecodeLinearInputs& inputs) { return check_inputs(inputs); }

std::int64_t decode_linear_workspace(const DecodeLinearInputs& inputs, int threads) {
  const PackedHeader header = check_inputs(inputs);
  return OFAKERN_DISPATCH(decode_linear_workspace, inputs, header, threads);
}

void decode_linear_cpu(const DecodeLinearInputs& inputs, const TensorView& out, const TensorView& workspace,
                       int threads) {
  const PackedHeader header = check_inputs(inputs);
  kCheck.plain("out", out, "[M, N]", {inputs.x.shape[0], header.n}, inputs.x.dtype);
  kCheck.workspace("workspace", workspace, OFAKERN_DISPATCH(decode_linear_workspace, inputs, header, threads));
  OFAKERN_DISPATCH(decode_linear, inputs, header, out, workspace, threads);
}

}  // namespace ofakern

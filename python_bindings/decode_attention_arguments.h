// A call's arguments in the order of the op's schema, for the CPU's binding and the GPU's.
#pragma once

#include "ops/decode_attention/decode_attention.h"
#include "tensor_caster.h"

namespace ofakern {

constexpr std::size_t kDecodeArguments = 14;  // with the threads, or `longest`

inline DecodeAttentionInputs read_decode_attention(Arguments& args) {
  DecodeAttentionInputs in;
  in.q = args.tensor("q");
  in.keys = args.tensor("keys");
  in.values = args.tensor("values");
  in.key_scales = args.tensor("key_scales");
  in.value_scales = args.tensor("value_scales");
  in.row_offsets = args.tensor("row_offsets");
  in.runs = args.tensor("runs");
  in.slots = args.rows("slots");
  in.counts = args.tensor("counts");
  in.bias = args.rows("bias");
  in.head_scale = args.tensor("head_scale");
  in.value_width = args.integer("value_width");
  in.scale = args.real("scale");
  return in;
}

}  // namespace ofakern

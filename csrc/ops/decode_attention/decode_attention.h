// Attention of one query token per row against keys that are stored once: the contract.
//
//   score[r,h,j] = scale * q[r,h].k_j[h] + bias[h, j]
//   out[r,h]     = head_scale[h] * sum_j softmax_j(score)[j] * v_j[h]          lse[r,h] = ln(sum_j exp(score))
//
// Rows row_offsets[b]..row_offsets[b + 1] (beams) belong to sample b. Its keys are either
//   a source: runs[b] = (first, count), packed in blocks (below), the same keys for all rows of the sample, or
//   slots: counts[b] keys, the j-th of row r in slot slots[r, j] (the ancestry table); no other slot is read.
// bias belongs to samples, not rows: its columns follow one another by sample. A row without keys gives out = 0 and
// lse = -inf. Sums and statistics are f32.
//
// Packed keys: a sample's keys are padded to a multiple of kBlock and zero there. `first` counts padded keys; the
// sample's part begins at element first * H * width and holds, by head, blocks [K' / step][kBlock keys][step]; values,
// by head, panels of kBlock columns [keys / step][kBlock columns][step]. step is 2 for bf16 (pairs along the depth of
// the product), else 1; K' is K, padded to a multiple of 32 for bf16; Kv is padded to a multiple of kBlock. Scales of
// int8: [H][padded keys]. The layout is the same for every instruction set. Derivation and floors: README.md.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "core/stream.h"
#include "core/tensor_view.h"

namespace ofakern {

constexpr std::int64_t kDecodeBlock = 32;
constexpr std::int64_t kDecodeMaxWidth = 256;

struct DecodeAttentionInputs {
  TensorView q;             // [R, H, K] f32, bf16 or f16, contiguous
  TensorView keys, values;  // of q's dtype, or u8 holding the bits of int8. Slots: [S, H, K], [S, H, Kv]. Source: flat
  TensorView key_scales, value_scales;  // f32, with int8: [S, H], or flat; else undefined
  TensorView row_offsets;               // i32 [B + 1]
  TensorView runs;                      // i32 [B, 2] of a source, else undefined
  TensorView slots;                     // i32 [R, T], last dimension contiguous; undefined of a source
  TensorView counts;                    // i32 [B], at most T; undefined of a source
  TensorView bias;                      // f32 [H, sum of counts], last dimension contiguous; or undefined
  TensorView head_scale;                // f32 [H] or undefined
  std::int64_t value_width;             // Kv
  double scale;
};

// K and Kv as a source stores them.
OFAKERN_ALWAYS_INLINE std::int64_t packed_key_width(std::int64_t width, DType stored) {
  return stored == DType::bf16 ? (width + 31) / 32 * 32 : width;
}
OFAKERN_ALWAYS_INLINE std::int64_t packed_value_width(std::int64_t width) {
  return (width + kDecodeBlock - 1) / kDecodeBlock * kDecodeBlock;
}
OFAKERN_ALWAYS_INLINE std::int64_t packed_count(std::int64_t count) {
  return (count + kDecodeBlock - 1) / kDecodeBlock * kDecodeBlock;
}

// Throws on the first broken rule. A part: given, of one of the dtypes and of this shape, its last dimension
// contiguous.
void check_decode_part(const char* argument, const TensorView& x, const char* letters,
                       std::initializer_list<std::int64_t> sizes, std::initializer_list<DType> dtypes);
void check_decode_attention(const DecodeAttentionInputs& inputs);
void check_decode_attention_results(const DecodeAttentionInputs& inputs, const TensorView& out, const TensorView& lse);
// The keys that runs [B, 2] cover, all of them in a packed source of `room` keys.
std::int64_t check_decode_runs(const TensorView& runs, std::int64_t room);

// k [N, H, K], v [N, H, Kv] (last dimension contiguous), the runs' samples one after the other, into keys and values
// (flat, fully written, pads included).
void decode_attention_pack(const TensorView& k, const TensorView& v, const TensorView& runs, const TensorView& keys,
                           const TensorView& values, int threads);

// A source made from what keys and values are projections of, without the projections in memory: k = states · Wk and
// v = states · Wv + bias, rounded to the dtype of states, then packed as above.
struct SourceProjection {
  TensorView states;  // [N, D] f32, bf16 or f16, rows contiguous: the runs' samples one after the other
  TensorView packed;  // Wk then Wv, [H * K + H * Kv, D], from decode_linear_pack for states' dtype
  TensorView bias;    // f32 [H * K + H * Kv] or undefined
  TensorView runs;    // i32 [B, 2]
  std::int64_t heads, key_width, value_width;
};
std::int64_t decode_attention_project_workspace(const SourceProjection& source, int threads);
// keys, values: flat, of states' dtype, fully written, pads included. The result does not depend on `threads`.
void decode_attention_project(const SourceProjection& source, const TensorView& keys, const TensorView& values,
                              const TensorView& workspace, int threads);

std::int64_t decode_attention_workspace(const DecodeAttentionInputs& inputs, int threads);

// out [R, H, Kv] of q's dtype, lse f32 [R, H]; both contiguous, fully written. Neither depends on `threads`.
void decode_attention_cpu(const DecodeAttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                          const TensorView& workspace, int threads);

// On a GPU all tensors are on its device, and a source is not packed: keys [S, H, K], values [S, H, Kv], scales [S, H],
// runs (first slot, count). What stands in row_offsets, runs, slots and counts is not checked, for the host does not
// know it: rows, keys and columns that are not there count as none. longest: at most so many keys has a sample of a
// source (0: not known), from which the blocks of a launch follow, and nothing else.
void check_decode_attention_cuda(const DecodeAttentionInputs& inputs);
std::int64_t decode_attention_workspace_cuda(const DecodeAttentionInputs& inputs, std::int64_t longest);
void decode_attention_cuda(const DecodeAttentionInputs& inputs, std::int64_t longest, const TensorView& out,
                           const TensorView& lse, const TensorView& workspace, Stream stream);

}  // namespace ofakern

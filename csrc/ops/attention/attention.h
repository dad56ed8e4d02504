// Attention with structured position bias: the contract every backend keeps.
//
//   score[h,i,j] = scale * (q[i,h].k[j,g] + q_pos[i,h].k_pos[j,g]) + sum_t table_t[h, q_coord_t[i] - k_coord_t[j]]
//   out[i,h]     = head_scale[h] * sum_j dropout(softmax_j(score))[j] * v[j,g]           g = h / (H / Hk)
//
// A key j takes part when visible[i].lo <= j < visible[i].hi; term t is added when also same_t[i].lo <= j <
// same_t[i].hi. A row that sees no key gives out = 0, lse = -inf and zero gradients. Keys no query sees are never read.
//
// Shapes: N packed tokens, H heads, Hk key heads (divides H), K/P/V widths (multiples of 8, at most 256), R table rows,
// B samples. All statistics and accumulations are f32; outputs have the inputs' dtype; tables, head_scale and their
// gradients are f32. Derivation, flops and floors: README.md beside this file.
#pragma once

#include <cstdint>

#include "core/stream.h"
#include "core/tensor_view.h"

namespace ofakern {

// A relative term. All undefined (empty view) when the call has no such term.
struct RelativeTermView {
  TensorView table;    // f32 [H, R], contiguous
  TensorView q_coord;  // i32 [Nq]
  TensorView k_coord;  // i32 [Nk]
  TensorView same;     // i32 [Nq, 2]
};

// Samples that take the same rows of q_pos and k_pos: a set. Token t of a sample takes row first + t, and a set has the
// rows of its longest sample. Queries then see keys of their own sample only. Undefined: every token has its own row.
struct SharedPositionsView {
  TensorView sets;     // i32 [U, 4]: first and last + 1 of the set's samples in `members`, first row of q_pos, of k_pos
  TensorView members;  // i32 [B], every sample once
};

// What does not change from layer to layer (built and validated once per batch by AttentionLayout).
struct AttentionLayoutView {
  TensorView visible;    // i32 [Nq, 2]
  TensorView q_offsets;  // i32 [B + 1], prefix sums of the samples' query counts
  TensorView k_offsets;  // i32 [B + 1]
  TensorView key_seen;   // u8 [Nk], 1 when some query sees the key
  TensorView k_range;    // i32 [B, 2], hull of the keys that the sample's queries see (lo = hi = 0 when none)
  SharedPositionsView shared;
};

struct AttentionInputs {
  TensorView q;      // [Nq, H, K]   last dimension contiguous, as for all of the next five
  TensorView k;      // [Nk, Hk, K]
  TensorView v;      // [Nk, Hk, V]
  TensorView q_pos;  // [Nq, H, P] or undefined; with shared positions [rows, H, P]
  TensorView k_pos;  // [Nk, Hk, P] or undefined; with shared positions [rows, Hk, P]
  RelativeTermView terms[2];
  TensorView head_scale;    // f32 [H] or undefined
  TensorView dropout_seed;  // i64 [2]: seed, offset; undefined when dropout_p == 0
  AttentionLayoutView layout;
  double scale;
  double dropout_p;  // in [0, 1)
};

struct AttentionGradients {
  TensorView dq, dk, dv;      // like q, k, v; contiguous
  TensorView dq_pos, dk_pos;  // like q_pos, k_pos; contiguous; undefined when absent
  TensorView dtables[2];      // f32 [H, R]; undefined when absent
  TensorView dhead_scale;     // f32 [H]; undefined when absent
};

// What every backend checks first. Values of the layout are checked where the CPU can read them.
void check_attention(const AttentionInputs& inputs);
void check_attention_results(const AttentionInputs& inputs, const TensorView& out, const TensorView& lse);
void check_attention_gradients(const AttentionInputs& inputs, const TensorView& dout, const TensorView& dlse,
                               const AttentionGradients& gradients);

// Bytes of scratch that a call needs. The caller allocates; kernels never do.
// threads: the parallelism the call will use; the result of a call does not depend on it.
int64_t attention_forward_workspace(const AttentionInputs& inputs, int threads);
int64_t attention_backward_workspace(const AttentionInputs& inputs, int threads);

// out [Nq, H, V] like q's dtype, lse f32 [Nq, H]; both contiguous, fully written.
void attention_forward_cpu(const AttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                           const TensorView& workspace, int threads);

// dout [Nq, H, V] and dlse f32 [Nq, H] (undefined when lse has no gradient) with the forward's out and lse.
// Every gradient is fully written. dk/dv of unseen keys and dq of rows without keys are 0.
void attention_backward_cpu(const AttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                            const TensorView& dout, const TensorView& dlse, const AttentionGradients& gradients,
                            const TensorView& workspace, int threads);

// On a GPU (sm_80 and newer), in the order of `stream`: bf16 and f16, K, P and V at most 128, rows of operands and dout
// aligned to 16 bytes. The layout's values are not read by the host.
std::int64_t attention_forward_workspace_cuda(const AttentionInputs& inputs);
std::int64_t attention_backward_workspace_cuda(const AttentionInputs& inputs);
void attention_forward_cuda(const AttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                            const TensorView& workspace, Stream stream);
void attention_backward_cuda(const AttentionInputs& inputs, const TensorView& out, const TensorView& lse,
                             const TensorView& dout, const TensorView& dlse, const AttentionGradients& gradients,
                             const TensorView& workspace, Stream stream);

}  // namespace ofakern

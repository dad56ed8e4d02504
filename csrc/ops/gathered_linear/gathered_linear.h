// The rows of an output projection that a closed set still allows: the contract.
//
//   state s allows tokens[first[s] .. first[s + 1]), a compressed sparse row (CSR) of token ids
//   row r in state s = states[r] gets, for each of them in that order,  values[i] = sum_d hidden[r, d] * weight[token,
//   d]
//
// Rows come one after another: row_first[r] is where those of row r begin. Each weight row is read once for all rows of
// its state. Sums are f32, in an order that D alone fixes: a row's numbers do not depend on the other rows.
// Layout, flops and floors: README.md beside this file.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace ofakern {

struct GatheredLinearInputs {
  TensorView hidden;  // [R, D], f32, bf16 or f16; rows contiguous
  TensorView weight;  // [V, D] of the same dtype; rows contiguous
  TensorView states;  // i32 [R], each in [0, S)
  TensorView first;   // i32 [S + 1]
  TensorView tokens;  // i32 [E]; those that the rows' states allow are in [0, V)
};

// How many values there are in all.
std::int64_t gathered_linear_count(const TensorView& states, const TensorView& first);

std::int64_t gathered_linear_workspace(const GatheredLinearInputs& inputs);

// values f32 [n], row_first i32 [R + 1], row_tokens i32 [n], all fully written. The result does not depend on
// `threads`.
void gathered_linear_cpu(const GatheredLinearInputs& inputs, const TensorView& values, const TensorView& row_first,
                         const TensorView& row_tokens, const TensorView& workspace, int threads);

// What the checks hand to a kernel: rows sorted by state, groups of rows of one state.
struct GatheredGroups {
  const std::int32_t* order;        // [R]: the rows, those of a state together
  const std::int32_t* group_first;  // [groups + 1]: where a group begins in `order`
  const std::int64_t* task_first;   // [groups + 1]: a group's tasks, kGatheredTokens tokens each
  std::int64_t groups;
  void* scratch;  // for gathered_linear_scratch bytes
};

constexpr std::int64_t kGatheredTokens = 64;  // of one task

}  // namespace ofakern

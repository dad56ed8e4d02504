// Checks every argument against the contract in gathered_linear.h, groups the rows by state, then calls the active
// instruction set's kernel.
#include "ops/gathered_linear/gathered_linear.h"

#include <algorithm>
#include <limits>
#include <string>

#include "core/check.h"
#include "core/isa.h"

namespace ofakern {

OFAKERN_DECLARE_FOR_EACH_ISA(std::int64_t gathered_linear_scratch(const GatheredLinearInputs& in);
                             void gathered_linear(const GatheredLinearInputs& in, const GatheredGroups& groups,
                                                  float* values, const std::int32_t* row_first, int threads);)

namespace {

constexpr Checker kCheck("gathered_linear");

void check_matrix(const char* argument, const TensorView& x, const char* letters, std::int64_t columns) {
  kCheck.given(argument, x);
  kCheck.dtype(argument, x, {DType::f32, DType::bf16, DType::f16});
  kCheck.shape(argument, x, letters, {-1, columns});
  kCheck.device(argument, x, Device::cpu);
  kCheck.last_contiguous(argument, x);
}

void check_states(const TensorView& states, const TensorView& first) {
  kCheck.plain("states", states, "[R]", {-1}, DType::i32);
  kCheck.plain("first", first, "[S + 1]", {-1}, DType::i32);
  const std::int64_t count = first.shape[0] - 1;
  kCheck.that(count >= 1, "first", "hold at least one state", describe(first));
  const std::int32_t *s = states.as<std::int32_t>(), *f = first.as<std::int32_t>();
  for (std::int64_t r = 0; r < states.shape[0]; ++r) {
    if (s[r] < 0 || s[r] >= count)
      kCheck.fail_value("states", "be in [0, S=" + std::to_string(count) + ")", std::to_string(s[r]));
    if (f[s[r]] < 0 || f[s[r]] > f[s[r] + 1])
      kCheck.fail_value("first", "not fall", std::to_string(f[s[r]]) + ", " + std::to_string(f[s[r] + 1]));
  }
}

void check_inputs(const GatheredLinearInputs& in) {
  check_matrix("hidden", in.hidden, "[R, D]", -1);
  check_matrix("weight", in.weight, "[V, D]", in.hidden.shape[1]);
  kCheck.same_dtype("weight", in.weight, "hidden", in.hidden);
  check_states(in.states, in.first);
  kCheck.shape("states", in.states, "[R]", {in.hidden.shape[0]});
  kCheck.plain("tokens", in.tokens, "[E]", {-1}, DType::i32);
}

// The tokens of one state, before any weight row is read at their place.
void check_tokens(const GatheredLinearInputs& in, std::int32_t state) {
  const std::int32_t *first = in.first.as<std::int32_t>(), *tokens = in.tokens.as<std::int32_t>();
  kCheck.that(first[state + 1] <= in.tokens.shape[0], "first",
              "end within tokens (" + std::to_string(in.tokens.shape[0]) + ")", std::to_string(first[state + 1]));
  const std::int64_t vocabulary = in.weight.shape[0];
  std::int32_t lowest = 0, highest = -1;
  for (std::int32_t e = first[state]; e < first[state + 1]; ++e) {
    lowest = std::min(lowest, tokens[e]);
    highest = std::max(highest, tokens[e]);
  }
  if (lowest < 0 || highest >= vocabulary)
    kCheck.fail_value("tokens", "be in [0, V=" + std::to_string(vocabulary) + ")",
                      std::to_string(lowest < 0 ? lowest : highest));
}

constexpr std::int64_t aligned(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

std::int64_t grouping_bytes(std::int64_t rows) {
  return aligned(rows * 4) + aligned((rows + 1) * 4) + aligned((rows + 1) * 8);
}

// The pieces of the workspace, which has been checked.
struct Pieces {
  std::int32_t *order, *group_first;
  std::int64_t* task_first;
  void* scratch;

  Pieces(void* base, std::int64_t rows) {
    char* at = static_cast<char*>(base);
    order = reinterpret_cast<std::int32_t*>(at);
    group_first = reinterpret_cast<std::int32_t*>(at += aligned(rows * 4));
    task_first = reinterpret_cast<std::int64_t*>(at += aligned((rows + 1) * 4));
    scratch = at + aligned((rows + 1) * 8);
  }
};

GatheredGroups group_rows(const GatheredLinearInputs& in, const Pieces& pieces) {
  const std::int64_t rows = in.states.shape[0];
  const std::int32_t *states = in.states.as<std::int32_t>(), *first = in.first.as<std::int32_t>();
  for (std::int64_t r = 0; r < rows; ++r) pieces.order[r] = static_cast<std::int32_t>(r);
  std::sort(pieces.order, pieces.order + rows, [states](std::int32_t a, std::int32_t b) {
    return states[a] != states[b] ? states[a] < states[b] : a < b;
  });
  std::int64_t groups = 0, tasks = 0;
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int32_t state = states[pieces.order[i]];
    if (i > 0 && state == states[pieces.order[i - 1]]) continue;
    check_tokens(in, state);
    pieces.group_first[groups] = static_cast<std::int32_t>(i);
    pieces.task_first[groups] = tasks;
    tasks += (first[state + 1] - first[state] + kGatheredTokens - 1) / kGatheredTokens;
    ++groups;
  }
  pieces.group_first[groups] = static_cast<std::int32_t>(rows);
  pieces.task_first[groups] = tasks;
  return {pieces.order, pieces.group_first, pieces.task_first, groups, pieces.scratch};
}

void write_rows(const GatheredLinearInputs& in, std::int32_t* row_first, std::int32_t* row_tokens) {
  const std::int32_t *states = in.states.as<std::int32_t>(), *first = in.first.as<std::int32_t>();
  const std::int32_t* tokens = in.tokens.as<std::int32_t>();
  row_first[0] = 0;
  for (std::int64_t r = 0; r < in.states.shape[0]; ++r) {
    const std::int32_t *begin = tokens + first[states[r]], *end = tokens + first[states[r] + 1];
    std::copy(begin, end, row_tokens + row_first[r]);
    row_first[r + 1] = row_first[r] + static_cast<std::int32_t>(end - begin);
  }
}

}  // namespace

std::int64_t gathered_linear_count(const TensorView& states, const TensorView& first) {
  check_states(states, first);
  const std::int32_t *s = states.as<std::int32_t>(), *f = first.as<std::int32_t>();
  std::int64_t count = 0;
  for (std::int64_t r = 0; r < states.shape[0]; ++r) count += f[s[r] + 1] - f[s[r]];
  kCheck.that(count <= std::numeric_limits<std::int32_t>::max(), "states", "allow fewer than 2^31 tokens in all",
              std::to_string(count));
  return count;
}

std::int64_t gathered_linear_workspace(const GatheredLinearInputs& inputs) {
  check_inputs(inputs);
  return grouping_bytes(inputs.states.shape[0]) + OFAKERN_DISPATCH(gathered_linear_scratch, inputs);
}

void gathered_linear_cpu(const GatheredLinearInputs& inputs, const TensorView& values, const TensorView& row_first,
                         const TensorView& row_tokens, const TensorView& workspace, int threads) {
  check_inputs(inputs);
  const std::int64_t count = gathered_linear_count(inputs.states, inputs.first);
  kCheck.plain("values", values, "[n]", {count}, DType::f32);
  kCheck.plain("row_first", row_first, "[R + 1]", {inputs.states.shape[0] + 1}, DType::i32);
  kCheck.plain("row_tokens", row_tokens, "[n]", {count}, DType::i32);
  const std::int64_t rows = inputs.states.shape[0];
  kCheck.workspace("workspace", workspace, grouping_bytes(rows) + OFAKERN_DISPATCH(gathered_linear_scratch, inputs));
  const GatheredGroups groups = group_rows(inputs, Pieces(workspace.data, rows));
  write_rows(inputs, row_first.as<std::int32_t>(), row_tokens.as<std::int32_t>());
  OFAKERN_DISPATCH(gathered_linear, inputs, groups, values.as<float>(), row_first.as<const std::int32_t>(), threads);
}

}  // namespace ofakern

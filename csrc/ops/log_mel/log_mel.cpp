// Checks the arguments, then calls the active instruction set's kernel.
#include "ops/log_mel/log_mel.h"

#include "core/check.h"
#include "core/isa.h"

namespace ofakern {

OFAKERN_DECLARE_FOR_EACH_ISA(std::int64_t log_mel_scratch(const LogMelInputs& in, int threads);
                             void log_mel(const LogMelInputs& in, const TensorView& out, const TensorView& workspace,
                                          int threads);)

std::int64_t log_mel_workspace(const LogMelInputs& inputs, int threads) {
  check_log_mel(inputs, true);
  return OFAKERN_DISPATCH(log_mel_scratch, inputs, threads);
}

void log_mel_cpu(const LogMelInputs& inputs, const TensorView& out, const TensorView& workspace, int threads) {
  check_log_mel(inputs, true);
  check_log_mel_out(inputs, out);
  Checker("log_mel").workspace("workspace", workspace, OFAKERN_DISPATCH(log_mel_scratch, inputs, threads));
  OFAKERN_DISPATCH(log_mel, inputs, out, workspace, threads);
}

}  // namespace ofakern

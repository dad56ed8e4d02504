"""One step of a search: from logits to the best continuations or a draw; csrc/ops/beam_step/README.md measures it."""

from ofakern.ops.beam_step.api import beam_step, refuse_invalid_candidates, refuse_invalid_draws, sample_step
from ofakern.ops.beam_step.rules import AutomatonTables, BeamCandidates, InvalidLogitsError, RaggedLogits, StepRules

__all__ = [
    "AutomatonTables",
    "BeamCandidates",
    "InvalidLogitsError",
    "RaggedLogits",
    "StepRules",
    "beam_step",
    "refuse_invalid_candidates",
    "refuse_invalid_draws",
    "sample_step",
]

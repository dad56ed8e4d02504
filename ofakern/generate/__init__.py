"""Search for answers: greedy, beams, sampling, under what a target may look like."""

from ofakern.generate.automaton import (
    ChoiceTokens,
    FixedTokens,
    FreeTokens,
    RangeTokens,
    RepeatTokens,
    TargetElement,
    TokenAutomaton,
    compile_target,
)
from ofakern.generate.candidates import CandidateSet, best_candidates, score_candidates
from ofakern.generate.config import GenerationConfig
from ofakern.generate.frames import FrameDecoder, Frames, generate_frames
from ofakern.generate.scoring import SpecialTokens
from ofakern.generate.search import DecodeState, Hypothesis, StepDecoder, generate

__all__ = [
    "CandidateSet",
    "ChoiceTokens",
    "DecodeState",
    "FixedTokens",
    "FrameDecoder",
    "Frames",
    "FreeTokens",
    "GenerationConfig",
    "Hypothesis",
    "RangeTokens",
    "RepeatTokens",
    "SpecialTokens",
    "StepDecoder",
    "TargetElement",
    "TokenAutomaton",
    "best_candidates",
    "compile_target",
    "generate",
    "generate_frames",
    "score_candidates",
]

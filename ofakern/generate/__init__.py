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
from ofakern.generate.search import (
    DecodeState,
    Finished,
    Hypothesis,
    SearchRequest,
    SearchSession,
    SpecialTokens,
    StepDecoder,
    TokenEvent,
    generate,
)

__all__ = [
    "CandidateSet",
    "ChoiceTokens",
    "DecodeState",
    "Finished",
    "FixedTokens",
    "FrameDecoder",
    "Frames",
    "FreeTokens",
    "GenerationConfig",
    "Hypothesis",
    "RangeTokens",
    "RepeatTokens",
    "SearchRequest",
    "SearchSession",
    "SpecialTokens",
    "StepDecoder",
    "TargetElement",
    "TokenAutomaton",
    "best_candidates",
    "TokenEvent",
    "compile_target",
    "generate",
    "generate_frames",
    "score_candidates",
]

"""Searches over a decoder's steps: any requests together in a `SearchSession`, or one batch with `generate`."""

from ofakern.generate.search.contract import (
    DecodeState,
    Finished,
    Hypothesis,
    SearchRequest,
    SpecialTokens,
    StepDecoder,
    TokenEvent,
)
from ofakern.generate.search.run import finish, generate
from ofakern.generate.search.session import SearchSession

__all__ = [
    "DecodeState",
    "Finished",
    "Hypothesis",
    "SearchRequest",
    "SearchSession",
    "SpecialTokens",
    "StepDecoder",
    "TokenEvent",
    "finish",
    "generate",
]

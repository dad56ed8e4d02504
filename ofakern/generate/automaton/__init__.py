"""What a target may look like, as a finite automaton over vocabulary ids."""

from ofakern.generate.automaton.automaton import TokenAutomaton
from ofakern.generate.automaton.compiler import compile_target
from ofakern.generate.automaton.elements import (
    ChoiceTokens,
    FixedTokens,
    FreeTokens,
    RangeTokens,
    RepeatTokens,
    TargetElement,
    leaves,
)

__all__ = [
    "ChoiceTokens",
    "FixedTokens",
    "FreeTokens",
    "RangeTokens",
    "RepeatTokens",
    "TargetElement",
    "TokenAutomaton",
    "compile_target",
    "leaves",
]

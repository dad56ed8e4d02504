"""What a target is made of, in reading order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ofakern.text.trie import TokenSequences


@dataclass(frozen=True)
class FixedTokens:
    """Text that stands in the target as it is: forced, scored by the model as it comes."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class ChoiceTokens:
    """One of a closed set of token sequences; probabilities are renormalised over what the set still allows.

    sequences: tuples of ids, or a `TokenSequences`, which is what a large set should come as.
    """

    sequences: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        if not isinstance(self.sequences, TokenSequences):  # hashable, for the compiler's cache
            object.__setattr__(self, "sequences", tuple(map(tuple, self.sequences)))


@dataclass(frozen=True)
class RangeTokens:
    """Exactly `count` tokens with lo <= id < hi: a box is four bins.

    renormalise: probabilities are taken over the range only, so that its logits are all that a step needs.
    """

    lo: int
    hi: int
    count: int
    renormalise: bool = False


@dataclass(frozen=True)
class FreeTokens:
    """Any number of tokens out of [lo, hi); it ends where the next element begins, or with the end of sequence."""

    lo: int
    hi: int


@dataclass(frozen=True)
class RepeatTokens:
    """A group that stands once or more, as `([BOX:b] [TEXT:t])*` does."""

    elements: tuple[TargetElement, ...]


TargetElement = FixedTokens | ChoiceTokens | RangeTokens | FreeTokens | RepeatTokens


def leaves(elements: Sequence[TargetElement]) -> Iterator[TargetElement]:
    """The elements in reading order, repeated groups opened: the numbering of `TokenAutomaton.trace`."""
    for element in elements:
        if isinstance(element, RepeatTokens):
            yield from leaves(element.elements)
        else:
            yield element


def longest_target(elements: Sequence[TargetElement]) -> int | None:
    """Most tokens before the end of sequence; None where there is no bound."""
    total = 0
    for element in elements:
        if isinstance(element, FixedTokens):
            total += len(element.tokens)
        elif isinstance(element, ChoiceTokens):
            total += TokenSequences.of(element.sequences).longest
        elif isinstance(element, RangeTokens):
            total += element.count
        else:
            return None
    return total

"""What a target may look like, as a finite automaton over vocabulary ids.

One automaton serves a whole batch: every row of the search carries one integer, its state. A state allows a few
explicit tokens (closed-set tries, fixed text) and a few ranges of ids (bins, text). All of it is tensors, so a step of
the search costs no Python per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ofakern.errors import OfakernValueError

_WHERE = "target automaton"


@dataclass(frozen=True)
class FixedTokens:
    """Text that stands in the target as it is: forced, scored by the model as it comes."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class ChoiceTokens:
    """One of a closed set of token sequences; probabilities are renormalised over what the set still allows."""

    sequences: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RangeTokens:
    """Exactly `count` tokens with lo <= id < hi: a box is four bins."""

    lo: int
    hi: int
    count: int


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


@dataclass
class _State:
    edges: dict[int, tuple[int, int]] = field(default_factory=dict)  # token: (next state, element)
    ranges: list[tuple[int, int, int, int]] = field(default_factory=list)  # lo, hi, next state, element
    also: list[int] = field(default_factory=list)  # whatever these states allow is allowed here too
    renormalise: bool = False
    free: bool = False


class TokenAutomaton:
    """States and what each allows, as tensors. Build one with `compile_target`.

    Attributes:
        start: the state in which a target starts, after its forced prefix.
        longest: most tokens a target can have before its end of sequence; None when it has no bound.
        renormalise: bool [S]; probabilities of this state are taken over the allowed tokens only.
        free: bool [S]; states of free text, where n-grams may be blocked.
    """

    def __init__(self, states: Sequence[_State], start: int, vocabulary_size: int, longest: int | None) -> None:
        self.vocabulary_size = vocabulary_size
        self.longest = longest
        self.start = start
        self._sink = len(states)  # where a token that was not allowed leads: nothing follows it
        self._states = list(states)
        padded = [*states, _State()]
        counts = torch.tensor([len(state.edges) for state in padded])
        flat = [(token, target) for state in padded for token, (target, _) in sorted(state.edges.items())]
        self._counts = counts
        self._first = counts.cumsum(0) - counts
        self._tokens = torch.tensor([token for token, _ in flat], dtype=torch.int64)
        self._targets = torch.tensor([target for _, target in flat], dtype=torch.int64)
        self._keys = torch.repeat_interleave(torch.arange(len(padded)), counts) * vocabulary_size + self._tokens
        width = max(len(state.ranges) for state in padded)
        rest = (0, 0, self._sink)
        filled = [[r[:3] for r in state.ranges] + [rest] * (width - len(state.ranges)) for state in padded]
        self._ranges = torch.tensor(filled, dtype=torch.int64).reshape(len(padded), width, 3)  # lo, hi, target
        self.renormalise = torch.tensor([state.renormalise for state in padded])
        self.free = torch.tensor([state.free for state in padded])

    def allowed(self, states: Tensor) -> Tensor:
        """bool [rows, V]: the tokens that may come next in `states` (int64 [rows])."""
        # Most rows of a batch are in few states.
        distinct, place = states.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        return self._allowed(distinct)[place]

    def _allowed(self, states: Tensor) -> Tensor:
        position = torch.arange(self.vocabulary_size)
        mask = torch.zeros(len(states), self.vocabulary_size, dtype=torch.bool)
        for lo, hi, _ in (part.unbind(1) for part in self._ranges[states].unbind(1)):
            mask |= (position >= lo[:, None]) & (position < hi[:, None])
        counts = self._counts[states]
        rows = torch.repeat_interleave(torch.arange(len(states)), counts)
        within = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        mask[rows, self._tokens[self._first[states][rows] + within]] = True
        return mask

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """int64 [rows]: the states after `tokens` (int64 [rows]); explicit tokens come before ranges."""
        after = torch.full_like(states, self._sink)
        for lo, hi, target in (part.unbind(1) for part in self._ranges[states].unbind(1)):
            after = torch.where((tokens >= lo) & (tokens < hi), target, after)
        if len(self._keys) == 0:
            return after
        key = states * self.vocabulary_size + tokens
        place = torch.searchsorted(self._keys, key).clamp(max=len(self._keys) - 1)
        return torch.where(self._keys[place] == key, self._targets[place], after)

    def trace(self, tokens: Sequence[int]) -> list[int]:
        """For each token the number of the element it belongs to; -1 from where the automaton does not allow them.

        Elements count in reading order, those of repeated groups included; the end of sequence comes after the last.
        """
        found: list[int] = []
        place = self.start
        for token in tokens:
            after = self._after(place, token)
            if after is None:
                break
            place, element = after
            found.append(element)
        return found + [-1] * (len(tokens) - len(found))

    def _after(self, place: int, token: int) -> tuple[int, int] | None:
        state = self._states[place]
        if token in state.edges:
            return state.edges[token]
        return next(((target, element) for lo, hi, target, element in state.ranges if lo <= token < hi), None)


class _Builder:
    def __init__(self, elements: int) -> None:
        self.states: list[_State] = []
        self._left = elements  # elements are built from the last to the first

    def new(self, *, renormalise: bool = False, free: bool = False) -> int:
        self.states.append(_State(renormalise=renormalise, free=free))
        return len(self.states) - 1

    def sequence(self, elements: Sequence[TargetElement], following: int) -> int:
        for element in reversed(elements):
            following = self.element(element, following)
        return following

    def element(self, element: TargetElement, following: int) -> int:
        if isinstance(element, RepeatTokens):
            again = self.new()
            start = self.sequence(element.elements, again)
            self.states[again].also.extend((start, following))
            return start
        self._left -= 1
        if isinstance(element, FixedTokens):
            return self._chain(element.tokens, following)
        if isinstance(element, ChoiceTokens):
            return self._trie(element.sequences, following)
        if isinstance(element, RangeTokens):
            for _ in range(element.count):
                state = self.new()
                self.states[state].ranges.append((element.lo, element.hi, following, self._left))
                following = state
            return following
        state = self.new(free=True)
        self.states[state].ranges.append((element.lo, element.hi, state, self._left))
        self.states[state].also.append(following)
        return state

    def _chain(self, tokens: Sequence[int], following: int) -> int:
        for token in reversed(tokens):
            state = self.new()
            self.states[state].edges[token] = following, self._left
            following = state
        return following

    def _trie(self, sequences: Sequence[Sequence[int]], following: int) -> int:
        if not sequences:
            raise OfakernValueError(f"{_WHERE}: closed set must hold at least one answer, got none")
        root = self.new(renormalise=True)
        for sequence in sequences:
            node = root
            for token in sequence:
                if token not in self.states[node].edges:
                    child = self.new(renormalise=True)
                    self.states[node].edges[token] = child, self._left
                node = self.states[node].edges[token][0]
            if following not in self.states[node].also:
                self.states[node].also.append(following)
        return root

    def closed(self) -> list[_State]:
        """The states with their `also` followed; a state's own edges come before those it took over."""
        result = []
        for index, state in enumerate(self.states):
            whole = _State(renormalise=state.renormalise, free=state.free)
            queue, seen = [index], {index}
            while queue:
                part = self.states[queue.pop(0)]
                for token, edge in part.edges.items():
                    whole.edges.setdefault(token, edge)
                for candidate in part.ranges:
                    _add_range(whole.ranges, candidate)
                queue += [other for other in part.also if other not in seen]
                seen.update(part.also)
            result.append(whole)
        return result


def _add_range(ranges: list[tuple[int, int, int, int]], candidate: tuple[int, int, int, int]) -> None:
    lo, hi, _, _ = candidate
    if candidate in ranges:
        return
    if any(lo < other_hi and other_lo < hi for other_lo, other_hi, _, _ in ranges):
        raise OfakernValueError(
            f"{_WHERE}: two neighbouring target slots must be told apart by their tokens, got both in [{lo}, {hi})"
            "\nTry: put plain text between them"
        )
    ranges.append(candidate)


def leaves(elements: Sequence[TargetElement]) -> Iterator[TargetElement]:
    """The elements in reading order, repeated groups opened: the numbering of `TokenAutomaton.trace`."""
    for element in elements:
        if isinstance(element, RepeatTokens):
            yield from leaves(element.elements)
        else:
            yield element


def _longest(elements: Sequence[TargetElement]) -> int | None:
    total = 0
    for element in elements:
        if isinstance(element, FixedTokens):
            total += len(element.tokens)
        elif isinstance(element, ChoiceTokens):
            total += max(map(len, element.sequences), default=0)
        elif isinstance(element, RangeTokens):
            total += element.count
        else:
            return None
    return total


def compile_target(elements: Sequence[TargetElement], *, eos: int, vocabulary_size: int) -> TokenAutomaton:
    """The automaton of a target whose parts stand in order and which ends with `eos`.

    Free text ends where the next part begins, so two neighbours that share their first tokens raise OfakernValueError.
    """
    count = sum(1 for _ in leaves(elements))
    builder = _Builder(count)
    end = builder.new()
    builder.states[end].edges[eos] = builder.new(), count
    start = builder.sequence(elements, end)
    return TokenAutomaton(builder.closed(), start, vocabulary_size, _longest(elements))

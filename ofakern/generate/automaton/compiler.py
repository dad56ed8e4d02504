"""From elements to an automaton's arrays: closed sets by numpy, a sorted trie at a time; everything else is few states.

States of fixed text, ranges, free text and group ends are plain objects: there are as many as the target is long. A
closed set adds one state per inner node of its trie, numbered from `_TRIES` on until all of them are known, and one
state for all its leaves, which differ in nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ofakern.errors import OfakernValueError
from ofakern.generate.automaton.automaton import Arrays, TokenAutomaton
from ofakern.generate.automaton.elements import (
    ChoiceTokens,
    FixedTokens,
    RangeTokens,
    RepeatTokens,
    TargetElement,
    leaves,
    longest_target,
)
from ofakern.text.trie import TokenSequences, TokenTrie

_WHERE = "target automaton"
_TRIES = 2**40
_MOST = 2**31 - 1
_Range = tuple[int, int, int, int]  # lo, hi, next state, element
_Column = npt.NDArray[np.int64]
_Rows = npt.NDArray[np.int64]  # transitions: state, token, target, element; or ranges: state, lo, hi, target, element


def compile_target(elements: Sequence[TargetElement], *, eos: int, vocabulary_size: int) -> TokenAutomaton:
    """The automaton of a target whose parts stand in order and which ends with `eos`.

    The last few are kept: the same elements (a `TokenSequences` is the same only as the same object) are compiled once.

    Raises:
        OfakernValueError: free text whose end cannot be told from the next part, a closed set without answers, ids
            outside the vocabulary, or more than 2**31 - 1 transitions.
    """
    return _compile(tuple(elements), eos, vocabulary_size)


@lru_cache(maxsize=16)
def _compile(elements: tuple[TargetElement, ...], eos: int, vocabulary_size: int) -> TokenAutomaton:
    count = sum(1 for _ in leaves(elements))
    builder = _Builder(count)
    final = builder.new()
    end = builder.new()
    builder.states[end].edges[eos] = final, count
    start = builder.sequence(elements, end)
    arrays = _Assembly(builder, vocabulary_size).arrays()
    return TokenAutomaton(arrays, builder.number(start), final, vocabulary_size, longest_target(elements))


@dataclass
class _State:
    edges: dict[int, tuple[int, int]] = field(default_factory=dict)  # token: (next state, element)
    ranges: list[_Range] = field(default_factory=list)
    also: list[int] = field(default_factory=list)  # whatever these states allow is allowed here too
    renormalise: bool = False
    free: bool = False


@dataclass(frozen=True)
class _Trie:
    """A closed set: its inner nodes, in the trie's order, are the states base, base + 1, ...; leaves are `leaf`."""

    trie: TokenTrie
    base: int
    leaf: int
    following: int
    element: int
    inner: _Column  # nodes
    ends: _Column  # those of `inner` (by place) where an answer ends too

    @property
    def state_of_node(self) -> _Column:
        states = np.full(len(self.trie), self.leaf, np.int64)
        states[self.inner] = self.base + np.arange(len(self.inner))
        return states


class _Builder:
    """Elements are built from the last to the first, so that each knows the state that follows it."""

    def __init__(self, elements: int) -> None:
        self.states: list[_State] = []
        self.tries: list[_Trie] = []
        self._left = elements
        self._trie_states = 0

    def new(self, *, renormalise: bool = False, free: bool = False) -> int:
        self.states.append(_State(renormalise=renormalise, free=free))
        return len(self.states) - 1

    def number(self, state: int) -> int:
        """A state's final number: tries come after the plain states."""
        return state if state < _TRIES else state - _TRIES + len(self.states)

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
            return self._closed_set(TokenSequences.of(element.sequences), following)
        if isinstance(element, RangeTokens):
            for _ in range(element.count):
                state = self.new(renormalise=element.renormalise)
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

    def _closed_set(self, sequences: TokenSequences, following: int) -> int:
        if not len(sequences):
            raise OfakernValueError(f"{_WHERE}: closed set must hold at least one answer, got none")
        trie = TokenTrie(sequences)
        inner = np.flatnonzero(np.diff(trie.first) > 0)
        leaf = self.new(renormalise=True)
        self.states[leaf].also.append(following)
        if not len(inner):  # the only answer is empty
            return leaf
        base = _TRIES + self._trie_states
        self._trie_states += len(inner)
        ends = np.flatnonzero(trie.sequence_at[inner] >= 0)
        self.tries.append(_Trie(trie, base, leaf, following, self._left, inner, ends))
        return base

    def part(self, state: int) -> _State:
        """A state as it was built, before its `also` is followed; of a closed set only its first one is asked for."""
        if state < _TRIES:
            return self.states[state]
        found = next(trie for trie in self.tries if trie.base == state)
        begin, end = found.trie.first[0], found.trie.first[1]
        targets = found.state_of_node[begin + 1 : end + 1].tolist()
        edges = {token: (t, found.element) for token, t in zip(found.trie.children(0).tolist(), targets, strict=True)}
        also = [found.following] if len(found.ends) and found.ends[0] == 0 else []
        return _State(edges, also=also, renormalise=True)

    def closure(self, state: int) -> _State:
        """A state with its `also` followed; its own edges come before those it takes over."""
        first = self.part(state)
        whole = _State(renormalise=first.renormalise, free=first.free)
        queue, seen = [first], {state}
        while queue:
            part = queue.pop(0)
            for token, edge in part.edges.items():
                whole.edges.setdefault(token, edge)
            for candidate in part.ranges:
                _add_range(whole.ranges, candidate)
            queue += [self.part(other) for other in part.also if other not in seen]
            seen.update(part.also)
        return whole


def _add_range(ranges: list[_Range], candidate: _Range) -> None:
    lo, hi, _, _ = candidate
    if candidate in ranges:
        return
    if any(lo < other_hi and other_lo < hi for other_lo, other_hi, _, _ in ranges):
        raise OfakernValueError(
            f"{_WHERE}: two neighbouring target slots must be told apart by their tokens, got both in [{lo}, {hi})"
            "\nTry: put plain text between them"
        )
    ranges.append(candidate)


class _Assembly:
    """All states in their final order: plain ones, the inner nodes of each closed set, the sink."""

    def __init__(self, builder: _Builder, vocabulary_size: int) -> None:
        self._builder, self._vocabulary = builder, vocabulary_size
        self._plain = [builder.closure(state) for state in range(len(builder.states))]
        self._sink = len(self._plain) + sum(len(trie.inner) for trie in builder.tries)

    def arrays(self) -> Arrays:
        edges, ranges = [self._plain_edges()], [self._plain_ranges()]
        renormalise, free = np.zeros(self._sink + 1, bool), np.zeros(self._sink + 1, bool)
        renormalise[: len(self._plain)] = [state.renormalise for state in self._plain]
        renormalise[len(self._plain) : -1] = True
        free[: len(self._plain)] = [state.free for state in self._plain]
        for trie in self._builder.tries:
            taken = self._builder.closure(trie.following)
            edges.append(self._trie_edges(trie, taken))
            ranges.append(self._taken_ranges(trie, taken))
        states, tokens, targets, elements = np.concatenate(edges).T
        _check(len(states), self._vocabulary, tokens)
        spans = np.concatenate(ranges)
        _check(len(spans), self._vocabulary, spans[:, 1], spans[:, 2] - 1)
        return Arrays(
            first=self._first(states),
            tokens=tokens.astype(np.int32),
            targets=targets.astype(np.int32),
            elements=elements.astype(np.int32),
            range_first=self._first(spans[:, 0]),
            ranges=spans[:, 1:4].astype(np.int32),
            range_elements=spans[:, 4].astype(np.int32),
            renormalise=renormalise,
            free=free,
        )

    def _plain_edges(self) -> _Rows:
        found = [
            (number, token, self._builder.number(target), element)
            for number, state in enumerate(self._plain)
            for token, (target, element) in sorted(state.edges.items())
        ]
        return np.array(found, np.int64).reshape(-1, 4)

    def _plain_ranges(self) -> _Rows:
        found = [row for number, state in enumerate(self._plain) for row in self._ranges(number, state)]
        return np.array(found, np.int64).reshape(-1, 5)

    def _ranges(self, number: int, state: _State) -> list[tuple[int, ...]]:
        return [(number, lo, hi, self._builder.number(target), element) for lo, hi, target, element in state.ranges]

    def _taken_ranges(self, trie: _Trie, taken: _State) -> _Rows:
        """The ranges of what follows, at each inner end."""
        one = np.array(self._ranges(0, taken), np.int64).reshape(-1, 5)
        found = np.tile(one, (len(trie.ends), 1))
        found[:, 0] = np.repeat(self._ends(trie), len(one))
        return found

    def _ends(self, trie: _Trie) -> _Column:
        return trie.ends + self._builder.number(trie.base)

    def _trie_edges(self, trie: _Trie, taken: _State) -> _Rows:
        """The trie's own edges, and at its inner ends those of what follows."""
        states = trie.state_of_node
        states[trie.inner] += self._builder.number(trie.base) - trie.base
        parents = np.repeat(np.arange(len(trie.trie)), np.diff(trie.trie.first))
        own = np.empty((len(parents), 4), np.int64)
        own[:, 0], own[:, 1], own[:, 2], own[:, 3] = states[parents], trie.trie.tokens, states[1:], trie.element
        count = len(trie.ends) * len(taken.edges)
        if count > _MOST:
            raise OfakernValueError(
                f"{_WHERE}: two neighbouring closed sets must have fewer than 2**31 transitions between them, got "
                f"{count}\nTry: put plain text between them"
            )
        one = [(0, token, self._builder.number(target), element) for token, (target, element) in taken.edges.items()]
        more = np.tile(np.array(one, np.int64).reshape(-1, 4), (len(trie.ends), 1))
        more[:, 0] = np.repeat(self._ends(trie), len(one))
        rows = np.concatenate((own, more))
        # By state, then token; of two with both the same the trie's own stays.
        _, kept = np.unique(rows[:, 0] * self._base(rows) + rows[:, 1], return_index=True)
        return rows[kept]

    def _base(self, rows: _Rows) -> int:
        return max(self._vocabulary, int(rows[:, 1].max()) + 1)

    def _first(self, states: _Column) -> npt.NDArray[np.int32]:
        counts = np.bincount(states, minlength=self._sink + 1)
        return np.concatenate(([0], counts.cumsum())).astype(np.int32)


def _check(count: int, vocabulary: int, *ids: _Column) -> None:
    if count > _MOST:
        raise OfakernValueError(f"{_WHERE}: transitions must be fewer than 2**31, got {count}")
    lowest, highest = min(int(x.min(initial=0)) for x in ids), max(int(x.max(initial=0)) for x in ids)
    if lowest < 0 or highest >= vocabulary:
        got = lowest if lowest < 0 else highest
        raise OfakernValueError(f"{_WHERE}: tokens must be in [0, {vocabulary}), got {got}")

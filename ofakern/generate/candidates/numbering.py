"""Every target that an automaton accepts, by number.

The number of a target is how many come before it in the order of tokens. A state knows how many targets lie behind it
and a transition how many behind the smaller tokens of its state, so that a number is the sum over a target's
transitions (Lucchesi and Kowaltowski, Applications of finite automata representing large vocabularies, 1993).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ofakern.errors import OfakernValueError
from ofakern.generate.automaton import TokenAutomaton

_WHERE = "candidates"
_MOST = 2**31 - 1
Numbers = npt.NDArray[np.int64]


class CandidateSet:
    """The targets of an automaton that is made of closed sets and fixed text.

    Attributes:
        first, tokens, targets: int64; the automaton's transitions, as in `automaton.tables`.
        before: int64 `[E]`; targets behind the smaller tokens of the same state.
        decided: bool `[S]`; one target only lies behind, and reaching it costs nothing: all probabilities are 1.
        left: int64 `[S]`; tokens to the end, where `decided`.
    """

    def __init__(self, automaton: TokenAutomaton) -> None:
        if automaton.longest is None or len(automaton.arrays.ranges):
            raise OfakernValueError(
                f"{_WHERE}: target must consist of closed sets and fixed text, got free text or a range of tokens"
            )
        self.automaton = automaton
        arrays = automaton.arrays
        self.first: Numbers = arrays.first.astype(np.int64)
        self.tokens: Numbers = arrays.tokens.astype(np.int64)
        self.targets: Numbers = arrays.targets.astype(np.int64)
        degree = np.diff(self.first)
        holding = np.flatnonzero(degree)
        begins = self.first[holding]
        behind = np.zeros(len(degree))  # float64 counts exactly far beyond what is accepted
        self.decided: npt.NDArray[np.bool_] = np.zeros(len(degree), bool)
        self.left: Numbers = np.zeros(len(degree), np.int64)
        behind[automaton.final], self.decided[automaton.final] = 1, True
        only = holding[(degree[holding] == 1) & arrays.renormalise[holding]]
        after = self.targets[self.first[only]]
        for _ in range(automaton.longest + 1):  # from the end to the beginning, a token at a time
            behind[holding] = np.add.reduceat(behind[self.targets], begins)
            self.decided[only] = self.decided[after]
            self.left[only] = 1 + self.left[after]
        if behind[automaton.start] > _MOST:
            raise OfakernValueError(f"{_WHERE}: targets must be fewer than 2**31, got {behind[automaton.start]:.3g}")
        self._count = int(behind[automaton.start])
        # Only states that a target passes through have a count that fits; the others are not asked for.
        each = np.minimum(behind, _MOST).astype(np.int64)[self.targets]
        summed = each.cumsum() - each
        self.before: Numbers = summed - np.repeat(summed[begins], degree[holding])

    def __len__(self) -> int:
        return self._count

    def sequence(self, number: int) -> tuple[int, ...]:
        """The tokens of a target, the end of sequence included."""
        if not 0 <= number < len(self):
            raise OfakernValueError(f"{_WHERE}: number must be in [0, {len(self)}), got {number}")
        state, tokens = self.automaton.start, []
        while state != self.automaton.final:
            begin, end = self.first[state : state + 2]
            place = begin + self.before[begin:end].searchsorted(number, "right") - 1
            number -= int(self.before[place])
            tokens.append(int(self.tokens[place]))
            state = int(self.targets[place])
        return tuple(tokens)

    def number(self, tokens: Sequence[int]) -> int:
        """The inverse of `sequence`. Raises OfakernValueError for what is no target."""
        state, number = self.automaton.start, 0
        for token in tokens:
            begin, end = self.first[state : state + 2]
            place = begin + self.tokens[begin:end].searchsorted(token)
            if place == end or self.tokens[place] != token:
                break
            number += int(self.before[place])
            state = int(self.targets[place])
        else:
            if state == self.automaton.final:
                return number
        raise OfakernValueError(f"{_WHERE}: tokens must be one of the targets, got {list(tokens)}")

    def transitions(self, states: Numbers) -> tuple[Numbers, Numbers]:
        """All transitions of each row's state: (row, transition), rows ascending, then tokens."""
        counts = self.first[states + 1] - self.first[states]
        rows = np.repeat(np.arange(len(states)), counts)
        within = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
        return rows, self.first[states][rows] + within

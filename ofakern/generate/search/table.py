"""The running hypotheses of all requests, as arrays: one record per row, one per group of beams.

Rows of a group stand together and groups of a sample too, in the order of the model's states. Columns are the session's
clock: whatever a row is fed now stands in the last column, wherever it began, so rows of all ages share two arrays and
end together, as the n-gram rules want it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["EARLY", "LATE", "NEVER_EARLY", "Array", "Table", "group_type"]

Array = NDArray[Any]

EARLY, LATE, NEVER_EARLY = 0, 1, 2  # early_stopping: True, False, "never"

_UNUSED = -1  # stands in the columns before a row's start
_TRIM = 256  # columns that nobody needs any more before they are dropped

#: A group: beams that compete with each other. A plain search is one group, a diverse one several, and every drawn
#: answer is a group of one row. Settings are copied into it, so that rows find everything with one gather.
group_type = np.dtype(
    [
        ("request", np.int64),
        ("number", np.int32),  # within its sample
        ("width", np.int32),  # beams
        ("level", np.int32),  # groups of one sample that choose one after the other have rising levels
        ("sampled", np.bool_),
        ("early", np.int8),
        ("found", np.int32),  # answers that ended
        ("worst", np.float64),  # the width-th best of them
        ("power", np.float64),  # length_penalty
        ("start", np.int64),  # column of the start token
        ("prefix", np.int64),  # forced tokens
        ("limit", np.int64),  # step at which the end of sequence is forced
        ("bounded", np.bool_),  # the automaton ends by itself, so that nothing needs to be forced
        ("earliest", np.int64),  # first step at which it is allowed
        ("counted", np.int64),  # first column that n-grams and repetitions count from
        ("automaton", np.int64),  # its number, -1 for none
        ("ofasys", np.bool_),  # forced prefixes as OFASys has them
        ("restricted", np.bool_),  # has tokens that it may not use
        ("ngram", np.int32),
        ("repetition", np.float32),
        ("unk", np.float32),
        ("temperature", np.float32),
        ("diversity", np.float32),
        ("seed", np.uint64),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("typical_p", np.float32),
        ("min_p", np.float32),
    ]
)


class Table:
    """The arrays.

    Attributes:
        groups: `group_type` [G]. group: int64 [R], each row's, rising.
        prefixes: int32 [G, P], the forced tokens.
        sums: float32 [R], of log-probabilities. states: int64 [R], the automaton's, counted inside it.
        tokens: int32 [R, C]. gains: float32 [R, C], the log-probability of the token in the same column.
        version: changes with `groups` and `group`, for what is derived from them.
    """

    def __init__(self) -> None:
        self.groups = np.zeros(0, group_type)
        self.prefixes = np.zeros((0, 0), np.int32)
        self.group = np.zeros(0, np.int64)
        self.sums = np.zeros(0, np.float32)
        self.states = np.zeros(0, np.int64)
        self.tokens = np.zeros((0, 1), np.int32)
        self.gains = np.zeros((0, 1), np.float32)
        self.version = 0
        self._offsets = np.zeros(1, np.int64)
        self._offsets_version = 0

    @property
    def clock(self) -> int:
        """The column of the tokens that are fed next."""
        return self.tokens.shape[1] - 1

    @property
    def steps(self) -> Array:
        """int64 [G]: tokens fed before this step, the start token not counted."""
        steps: Array = self.clock - self.groups["start"]
        return steps

    @property
    def offsets(self) -> Array:
        """int64 [G + 1]: each group's first row."""
        if self._offsets_version != self.version:
            self._offsets = np.searchsorted(self.group, np.arange(len(self.groups) + 1))
            self._offsets_version = self.version
        return self._offsets

    def add(self, groups: Array, prefixes: list[Array], states: Array, bos: int) -> None:
        """One row for each of `groups`, behind those that run, at the automaton's `states`.

        Sets `start` and moves `counted`, which is given relative to it.
        """
        count, columns = len(groups), self.tokens.shape[1]
        groups["start"] = self.clock
        groups["counted"] += self.clock
        longest = max(self.prefixes.shape[1], *(len(prefix) for prefix in prefixes), 0)
        wide = np.zeros((len(self.groups) + count, longest), np.int32)
        wide[: len(self.groups), : self.prefixes.shape[1]] = self.prefixes
        for row, prefix in zip(wide[len(self.groups) :], prefixes, strict=True):
            row[: len(prefix)] = prefix
        tokens = np.full((count, columns), _UNUSED, np.int32)
        tokens[:, -1] = bos
        self.group = np.concatenate((self.group, np.arange(count) + len(self.groups)))
        self.groups = np.concatenate((self.groups, groups))
        self.prefixes = wide
        self.sums = np.concatenate((self.sums, np.zeros(count, np.float32)))
        self.states = np.concatenate((self.states, states))
        self.tokens = np.concatenate((self.tokens, tokens))
        self.gains = np.concatenate((self.gains, np.zeros((count, columns), np.float32)))
        self.version += 1

    def grow(self, parents: Array, tokens: Array, gains: Array, sums: Array, states: Array) -> None:
        """Rows become continuations of `parents` (groups without any leave): one more column, the clock goes on."""
        self._choose(parents)
        self.sums, self.states = sums.astype(np.float32), states
        self.tokens = np.concatenate((self.tokens, tokens[:, None].astype(np.int32)), 1)
        self.gains = np.concatenate((self.gains, gains[:, None]), 1)
        self._trim()

    def keep(self, rows: Array) -> None:
        """Keep `rows` (int64, rising) only, and the groups that still have one."""
        self.sums, self.states = self.sums[rows], self.states[rows]
        self._choose(rows)
        self._trim()

    def _choose(self, rows: Array) -> None:
        if len(rows) == len(self.group) and np.array_equal(rows, np.arange(len(rows))):
            return
        self.tokens, self.gains = self.tokens[rows], self.gains[rows]
        group = self.group[rows]
        if np.array_equal(group, self.group):
            return
        kept, self.group = np.unique(group, return_inverse=True)
        if len(kept) < len(self.groups):
            self.groups, self.prefixes = self.groups[kept], self.prefixes[kept]
        self.version += 1

    def _trim(self) -> None:
        """Drop the columns before all starts: a session may serve for days."""
        first = int(self.groups["start"].min(initial=self.clock))
        if first >= _TRIM:
            self.tokens, self.gains = self.tokens[:, first:].copy(), self.gains[:, first:].copy()
            self.groups["start"] -= first
            self.groups["counted"] -= first
            self.version += 1

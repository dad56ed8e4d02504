"""The automata of all running requests as one: their tables stand one behind the other, so one call serves them all."""

from __future__ import annotations

import numpy as np
import torch

from ofakern.generate.automaton import TokenAutomaton
from ofakern.generate.search.table import Array
from ofakern.ops.beam_step import AutomatonTables

__all__ = ["Automata"]

_KEPT = 64  # automata kept for requests to come


class Automata:
    """Automata by number. `base[number]` is where an automaton's states begin in `tables`."""

    def __init__(self) -> None:
        self._known: list[TokenAutomaton] = []
        self.base = np.zeros(0, np.int64)
        self._tables: AutomatonTables | None = None
        self._keys = np.zeros(0, np.int64)
        self.narrow = np.zeros(0, np.bool_)

    def number(self, automaton: TokenAutomaton) -> int:
        """The automaton's number; a new one is taken in."""
        for number, known in enumerate(self._known):
            if known is automaton:
                return number
        self._known.append(automaton)
        self._tables = None
        return len(self._known) - 1

    def forget(self, used: Array) -> Array | None:
        """When there are too many, drop automata whose number is not in `used`.

        int64: the new number of each old one; None where nothing changes.
        """
        if len(self._known) <= _KEPT:
            return None
        keep = np.unique(used[used >= 0])
        renumbered = np.full(len(self._known), -1)
        renumbered[keep] = np.arange(len(keep))
        self._known = [self._known[number] for number in keep]
        self._tables = None
        return renumbered

    @property
    def tables(self) -> AutomatonTables:
        if self._tables is None:
            self._join()
            assert self._tables is not None
        return self._tables

    def _join(self) -> None:
        parts = [_tables(automaton) for automaton in self._known]
        sizes = np.array([len(part.renormalise) for part in parts])
        self.base = sizes.cumsum() - sizes
        self._tables = parts[0] if len(parts) == 1 else _joined(parts, self.base.tolist())
        self.narrow = np.zeros(int(sizes.sum()), np.bool_)
        vocabulary = max(automaton.vocabulary_size for automaton in self._known)
        counts = np.diff(self._tables.first.numpy())
        self._stride = vocabulary
        self._keys = np.repeat(np.arange(len(counts)) * vocabulary, counts) + self._tables.tokens.numpy()

    def advance(self, states: Array, tokens: Array) -> Array:
        """int64 [rows]: the states (counted in `tables`) after `tokens`; explicit tokens come before ranges."""
        tables = self.tables
        after = np.full(len(states), len(tables.renormalise) - 1)  # a sink: nothing follows
        for number, entry in self._ranges_of(states):
            lo, hi, target = tables.ranges.numpy()[entry].T
            inside = (tokens[number] >= lo) & (tokens[number] < hi)
            after[number[inside]] = target[inside]
        if len(self._keys):
            key = states * self._stride + tokens
            place = np.searchsorted(self._keys, key).clip(max=len(self._keys) - 1)
            after = np.where(self._keys[place] == key, tables.targets.numpy()[place], after)
        return after

    def _ranges_of(self, states: Array) -> list[tuple[Array, Array]]:
        """Row numbers and range entries, one pair of arrays for each place a range has in its state."""
        first = self.tables.range_first.numpy()
        begin, count = first[states], first[states + 1] - first[states]
        found = []
        for place in range(int(count.max(initial=0))):
            number = np.flatnonzero(count > place)
            found.append((number, begin[number] + place))
        return found


def _joined(parts: list[AutomatonTables], base: list[int]) -> AutomatonTables:
    def chained(firsts: list[torch.Tensor]) -> torch.Tensor:
        counts = torch.cat([first.diff() for first in firsts])
        return torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)

    shifted = []
    for part, offset in zip(parts, base, strict=True):
        ranges = part.ranges.clone()
        ranges[:, 2] += offset
        shifted.append(ranges)
    return AutomatonTables(
        first=chained([part.first for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
        targets=torch.cat([part.targets + offset for part, offset in zip(parts, base, strict=True)]),
        range_first=chained([part.range_first for part in parts]),
        ranges=torch.cat(shifted),
        renormalise=torch.cat([part.renormalise for part in parts]),
        free=torch.cat([part.free for part in parts]),
    )


def _tables(automaton: TokenAutomaton) -> AutomatonTables:
    counts = automaton._counts
    used = automaton._ranges[:, :, 1] > automaton._ranges[:, :, 0]
    return AutomatonTables(
        first=torch.cat((counts.new_zeros(1), counts.cumsum(0))).int(),
        tokens=automaton._tokens.int(),
        targets=automaton._targets.int(),
        range_first=torch.cat((counts.new_zeros(1), used.sum(1).cumsum(0))).int(),
        ranges=automaton._ranges.reshape(-1, 3)[used.reshape(-1)].int(),
        renormalise=automaton.renormalise,
        free=automaton.free,
    )

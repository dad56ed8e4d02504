"""The automata of all running requests as one: their tables stand one behind the other, so one call serves them all."""

from __future__ import annotations

from dataclasses import fields

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
        self._vocabulary = 0
        self._moved: tuple[AutomatonTables, AutomatonTables] | None = None

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

    def tables_on(self, device: torch.device) -> AutomatonTables:
        """`tables` where the logits are; a GPU's copy is made once, for all steps."""
        if device.type == "cpu":
            return self.tables
        if self._moved is None or self._moved[0] is not self.tables or self._moved[1].first.device != device:
            there = (getattr(self.tables, field.name).to(device) for field in fields(AutomatonTables))
            self._moved = self.tables, AutomatonTables(*there)
        return self._moved[1]

    def _join(self) -> None:
        parts = [automaton.tables for automaton in self._known]
        sizes = np.array([len(part.renormalise) for part in parts])
        self.base = sizes.cumsum() - sizes
        self._tables = parts[0] if len(parts) == 1 else _joined(parts, self.base.tolist())
        self._vocabulary = min(automaton.vocabulary_size for automaton in self._known)

    def narrow(self, states: Array) -> bool:
        """Whether the logits of few tokens are all that a step in these states needs: all are of closed sets."""
        tables = self.tables
        first, range_first = tables.first.numpy(), tables.range_first.numpy()
        few = first[states + 1] - first[states] <= self._vocabulary // 4  # else the whole product is the cheaper one
        explicit = range_first[states + 1] == range_first[states]
        return bool((few & explicit & tables.renormalise.numpy()[states]).all())

    def span(self, states: Array) -> tuple[int, int] | None:
        """The ids (lo, hi) that all these states choose from, by themselves, when it is one range of few."""
        tables = self.tables
        first, range_first = tables.first.numpy(), tables.range_first.numpy()
        begin = range_first[states]
        alone = (range_first[states + 1] - begin == 1) & (first[states + 1] == first[states])
        if not (alone & tables.renormalise.numpy()[states]).all():
            return None
        lo, hi, _ = tables.ranges.numpy()[begin].T
        few = hi[0] - lo[0] <= self._vocabulary // 2
        return (int(lo[0]), int(hi[0])) if few and (lo == lo[0]).all() and (hi == hi[0]).all() else None

    def advance(self, states: Array, tokens: Array) -> Array:
        """int64 [rows]: the states after `tokens`; explicit tokens come before ranges."""
        tables = self.tables
        after = np.full(len(states), len(tables.renormalise) - 1)  # a sink: nothing follows
        ranges, first = tables.ranges.numpy(), tables.range_first.numpy()
        begin, count = first[states], first[states + 1] - first[states]
        for number in range(int(count.max(initial=0))):
            rows = np.flatnonzero(count > number)
            lo, hi, target = ranges[begin[rows] + number].T
            inside = (tokens[rows] >= lo) & (tokens[rows] < hi)
            after[rows[inside]] = target[inside]
        place = _find(tables.first.numpy(), tables.tokens.numpy(), states, tokens)
        found = place >= 0
        after[found] = tables.targets.numpy()[place[found]]
        return after


def _find(first: Array, members: Array, states: Array, tokens: Array) -> Array:
    """int64 [rows]: the place of each row's token among its state's, which ascend; -1 where it is not there."""
    lo, end = first[states].astype(np.int64), first[states + 1].astype(np.int64)
    hi = end.copy()
    last = max(len(members) - 1, 0)
    for _ in range(int((end - lo).max(initial=0)).bit_length()):
        middle = (lo + hi) // 2
        below = (lo < hi) & (members[np.minimum(middle, last)] < tokens)
        lo, hi = np.where(below, middle + 1, lo), np.where(below, hi, np.minimum(middle, hi))
    place = np.minimum(lo, last)
    return np.where((lo < end) & (members[place] == tokens), lo, -1) if len(members) else np.full(len(states), -1)


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

"""What rows have written so far: keys and values in slots that never move, and the table of every row's slots."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ofakern.ops.decode_attention import KeyValueCache

FIRST_STEPS = 16


class Past:
    """Self-attention's caches, one per layer, and `table` int32 `[R, steps]`: the slot of each row's step.

    A slot is written once. Rows that multiply share their ancestors' slots; slots that no row reaches any more are
    taken again when there are no others. make(slots): a layer's empty cache.
    """

    def __init__(self, rows: int, layers: int, steps: int, make: Callable[[int], KeyValueCache]) -> None:
        first = min(FIRST_STEPS, steps)
        self.caches = [make(max(rows * first, 1)) for _ in range(layers)]
        self.table = torch.zeros((rows, first), dtype=torch.int32)
        self._free = np.arange(rows * first)
        self._kept_free = 2

    @property
    def rows(self) -> int:
        return self.table.shape[0]

    @property
    def spare_slot(self) -> int:
        """One that no row reaches, where the last call of `extend` was asked for a spare one."""
        return int(self._free[0])

    def extend(self, counts: np.ndarray, spare: int = 0) -> Tensor:
        """Gives every row a slot for its next step, the `counts[r]`-th, and returns them, int32 `[R]`.

        spare: slots that stay free."""
        if len(self._free) < self.rows + spare:
            self._reclaim(counts, self.rows + spare)
        slots = torch.from_numpy(self._free[: self.rows].astype(np.int32))
        self._free = self._free[self.rows :]
        last = int(counts.max(initial=0))
        if last >= self.table.shape[1]:
            self.table = _widened(self.table, 2 * last)
        if self.rows and bool((counts == last).all()):
            self.table[:, last] = slots
        else:
            self.table[torch.arange(self.rows), torch.from_numpy(counts)] = slots
        return slots

    def select(self, index: Tensor) -> None:
        """Row r becomes what row `index[r]` was."""
        self.table = self.table.index_select(0, index)

    def reserve(self, slots: int) -> None:
        """At least so many slots, which grow no more before three quarters of them are in use."""
        self._kept_free = 4
        if self.caches[0].slots < slots:
            self._grow(slots)

    def settle(self, counts: np.ndarray, caches: list[KeyValueCache]) -> None:
        """Everything moves into these caches, whose content is lost. counts: steps of each row so far."""
        fresh = Past(0, 0, FIRST_STEPS, lambda slots: caches[0])
        fresh.caches, fresh._free = caches, np.arange(caches[0].slots)
        fresh.join(np.zeros(0, np.int64), self, counts)
        self.caches, self.table, self._free = fresh.caches, fresh.table, fresh._free

    def join(self, counts: np.ndarray, other: Past, other_counts: np.ndarray) -> None:
        """The other's rows come after ours, their slots copied into free ones. counts: steps of each row so far."""
        theirs = _reached(other.table, other_counts)
        if len(self._free) < len(theirs):
            self._reclaim(counts, len(theirs))
        ours, self._free = self._free[: len(theirs)], self._free[len(theirs) :]
        if len(theirs):
            for mine, cache in zip(self.caches, other.caches, strict=True):
                k, v, _ = cache.natural()
                mine.write(torch.from_numpy(ours), k[torch.from_numpy(theirs)], v[torch.from_numpy(theirs)])
        moved = np.zeros(other.caches[0].slots, dtype=np.int32)
        moved[theirs] = ours
        steps = max(self.table.shape[1], other.table.shape[1])
        renamed = torch.from_numpy(moved[other.table.numpy()])
        self.table = torch.cat([_widened(self.table, steps), _widened(renamed, steps)])

    def _reclaim(self, counts: np.ndarray, wanted: int) -> None:
        """Finds `wanted` free slots: those that no row reaches, and a larger cache where most of it is in use."""
        slots = self.caches[0].slots
        free = np.ones(slots, dtype=bool)
        free[_reached(self.table, counts)] = False
        self._free = np.flatnonzero(free)
        if len(self._free) < max(wanted, slots // self._kept_free):
            self._grow(slots + max(wanted, slots, FIRST_STEPS * self.rows))

    def _grow(self, slots: int) -> None:
        have = self.caches[0].slots
        self.caches = [cache.grown(slots) for cache in self.caches]
        self._free = np.concatenate([self._free, np.arange(have, slots)])


def _reached(table: Tensor, counts: np.ndarray) -> np.ndarray:
    """The slots of the rows' steps so far, each once, ascending."""
    steps = np.arange(table.shape[1])
    return np.unique(table.numpy()[steps < counts[:, None]])


def _widened(table: Tensor, steps: int) -> Tensor:
    rows, have = table.shape
    return torch.cat([table, table.new_zeros((rows, steps - have))], 1) if steps > have else table

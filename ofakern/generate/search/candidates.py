"""Every group's best continuations of a step, and which of them go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ofakern.generate.search.restrict import Adjustments
from ofakern.generate.search.table import Array, Table

__all__ = ["Candidates", "penalise_chosen"]

NEVER = float("-inf")


@dataclass(frozen=True)
class Candidates:
    """Best first; scores float32 [G, W], -inf for none.

    origins: int64 [G, W], row within the group. tokens: int64 [G, W]. gains: float32 [G, W], the step's part of scores.
    """

    scores: Array
    origins: Array
    tokens: Array
    gains: Array

    @classmethod
    def none(cls, groups: int, width: int) -> Candidates:
        shape = groups, width
        never = np.full(shape, NEVER, np.float32)
        return cls(never, np.zeros(shape, np.int64), np.full(shape, -1), never.copy())

    def put(self, groups: Array, scores: Any, origins: Any, tokens: Any, gains: Any) -> None:
        """Fill in the candidates [n, w] of the n groups that `groups` (bool [G] or indices) selects."""
        w = min(scores.shape[1], self.scores.shape[1])
        for own, new in ((self.scores, scores), (self.origins, origins), (self.tokens, tokens), (self.gains, gains)):
            own[groups, :w] = new[:, :w]

    def put_draws(self, groups: Array, rows: Array, sums: Array, tokens: Array, gains: Array) -> None:
        """Fill in what was drawn in `rows` (bool [R]), one of each of `groups` (bool [G]); the rest is of all rows."""
        chosen, own = tokens[rows, None], gains[rows, None]
        self.put(groups, sums[rows, None] + own, np.zeros_like(chosen), chosen, own)

    def ending(self, widths: Array, eos: int) -> Array:
        """bool [G, W]: answers end from within the best `widths` candidates only."""
        rank = np.arange(self.scores.shape[1])
        ends: Array = (self.tokens == eos) & (self.scores > NEVER) & (rank < widths[:, None])
        return ends

    def continuing(self, widths: Array, eos: int) -> Array:
        """bool [G, W]: the best `widths` that do not end, out of the best 2 x `widths` (fairseq's rule)."""
        rank = np.arange(self.scores.shape[1])
        going = (self.tokens != eos) & (self.scores > NEVER) & (rank < 2 * widths[:, None])
        kept: Array = going & (going.cumsum(1) <= widths[:, None])
        return kept


def penalise_chosen(adjustments: Adjustments, chosen: Candidates, table: Table, level: Array, eos: int) -> None:
    """Diverse beam search: each row of the groups `level` (bool [G]) pays for every token its sample has just taken.

    `chosen` has the candidates of the groups that chose before, none of the others. Source: Vijayakumar et al., arXiv
    1610.02424, with the Hamming diversity of transformers.
    """
    groups = table.groups
    group, column = chosen.continuing(groups["width"], eos).nonzero()
    taken_by, taken = groups["request"][group], chosen.tokens[group, column]  # requests rise with the rows
    rows = np.flatnonzero(level[table.group])
    request = groups["request"][table.group[rows]]
    begin, end = np.searchsorted(taken_by, request), np.searchsorted(taken_by, request, "right")
    counts = end - begin
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    rows = np.repeat(rows, counts)
    adjustments.add(rows, taken[np.repeat(begin, counts) + within], -groups["diversity"][table.group[rows]])

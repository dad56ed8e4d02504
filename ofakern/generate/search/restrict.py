"""Tokens that a request may not use, as what is added to log-probabilities: suppressed tokens and bad words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ofakern.generate.config import GenerationConfig
from ofakern.generate.search.table import Array, Table

__all__ = ["Adjustments", "forbidden_ids", "restrictions"]


class Adjustments:
    """(row, token, value) triples, gathered in any order; `csr` sorts them by row."""

    def __init__(self) -> None:
        self._rows: list[Array] = []
        self._tokens: list[Array] = []
        self._values: list[Array] = []

    def add(self, rows: Array, tokens: Array, values: Array) -> None:
        """Arrays of one length."""
        self._rows.append(rows)
        self._tokens.append(tokens)
        self._values.append(values)

    def csr(self, rows: int) -> tuple[Array, Array, Array] | None:
        """first int32 [rows + 1], tokens int32 [n], values float32 [n]; None where there are none."""
        if not any(map(len, self._rows)):
            return None
        row = np.concatenate(self._rows)
        order = np.argsort(row, kind="stable")
        first = np.zeros(rows + 1, np.int32)
        first[1:] = np.bincount(row, minlength=rows).cumsum()
        tokens, values = np.concatenate(self._tokens)[order], np.concatenate(self._values)[order]
        return first, tokens.astype(np.int32), values.astype(np.float32)


def forbidden_ids(config: GenerationConfig) -> list[int]:
    """Every id that the restrictions of a configuration name."""
    return [
        *config.suppress_tokens,
        *config.begin_suppress_tokens,
        *(id for word in config.bad_words_ids for id in word),
    ]


def restrictions(table: Table, configs: Mapping[int, GenerationConfig]) -> Adjustments:
    """What the running requests forbid at this step; work is per request that forbids something. configs: by id."""
    found = Adjustments()
    offsets, steps = table.offsets, table.steps
    for group in np.flatnonzero(table.groups["restricted"]):
        config = configs[int(table.groups["request"][group])]
        rows = np.arange(offsets[group], offsets[group + 1])
        banned = [*config.suppress_tokens, *(word[0] for word in config.bad_words_ids if len(word) == 1)]
        if steps[group] == table.groups["prefix"][group]:
            banned += config.begin_suppress_tokens
        _ban(found, rows, banned)
        for word in config.bad_words_ids:
            if 1 < len(word) <= table.tokens.shape[1] + 1:
                ended = (table.tokens[rows, 1 - len(word) :] == np.array(word[:-1])).all(1)
                _ban(found, rows[ended], word[-1:])
    return found


def _ban(found: Adjustments, rows: Array, tokens: Sequence[int]) -> None:
    if len(rows) and len(tokens):
        found.add(
            np.repeat(rows, len(tokens)),
            np.tile(np.array(tokens, np.int32), len(rows)),
            np.full(len(rows) * len(tokens), -np.inf, np.float32),
        )

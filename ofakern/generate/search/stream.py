"""Which tokens of a running answer are certain: all that its hypotheses agree on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ofakern.generate.search.contract import TokenEvent
from ofakern.generate.search.plan import Running
from ofakern.generate.search.table import Array, Table

__all__ = ["certain_tokens", "last_tokens"]


def certain_tokens(one: Running, table: Table) -> list[TokenEvent]:
    """What became certain at this step. A drawn or greedy answer has one hypothesis, so all of it is."""
    groups = np.flatnonzero(table.groups["request"] == one.id)
    if not len(groups):
        return []
    offsets = table.offsets
    if one.config.do_sample:
        events = []
        for group in groups:
            sequence = int(table.groups["number"][group])
            events += _new(one, table, sequence, np.arange(offsets[group], offsets[group + 1]))
        return events
    return _new(one, table, 0, np.arange(offsets[groups[0]], offsets[groups[-1] + 1]))


def _new(one: Running, table: Table, sequence: int, rows: Array) -> list[TokenEvent]:
    """The tokens after those sent that all rows and all answers found agree on."""
    sent, prefix = one.sent[sequence], len(one.prefix)
    begin = int(table.groups["start"][table.group[rows[0]]]) + 1 + prefix + sent
    block = table.tokens[rows, begin:]
    agreed = _common(block)
    if not one.config.do_sample:
        for answer in (answer for group in one.found for answer in group):
            agreed = min(agreed, _common_with(block[0], answer.tokens[prefix + sent :]))
    return _events(one, sequence, block[0, :agreed].tolist(), table.gains[rows[0], begin : begin + agreed].tolist())


def _common(block: Array) -> int:
    """How many first columns have one value."""
    different = np.flatnonzero((block != block[:1]).any(0))
    return int(different[0]) if len(different) else block.shape[1]


def _common_with(row: Array, tokens: Sequence[int]) -> int:
    length = min(len(row), len(tokens))
    different = np.flatnonzero(row[:length] != np.array(tokens[:length], row.dtype))
    return int(different[0]) if len(different) else length


def last_tokens(one: Running) -> list[TokenEvent]:
    """The rest of an answer that is finished; of the best one where they were searched for."""
    if one.config.do_sample:
        chosen = [(number, group[0]) for number, group in enumerate(one.found) if group]
    else:
        chosen = [(0, answer) for answer in one.answers()[:1]]
    events = []
    for sequence, answer in chosen:
        begin = len(one.prefix) + one.sent[sequence]
        events += _events(one, sequence, answer.tokens[begin:], answer.token_scores[begin:])
    return events


def _events(one: Running, sequence: int, tokens: Sequence[int], gains: Sequence[float]) -> list[TokenEvent]:
    sent = one.sent[sequence]
    one.sent[sequence] += len(tokens)
    pairs = enumerate(zip(tokens, gains, strict=True), sent)
    return [TokenEvent(one.id, sequence, step, token, gain) for step, (token, gain) in pairs]

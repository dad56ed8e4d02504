"""Random steps of a search, and the rule that any kernel's choice keeps: order and ties are the reference's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ofakern.ops.beam_step import AutomatonTables, BeamCandidates, InvalidLogitsError, RaggedLogits, StepRules

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEVER = float("-inf")


def i32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def offsets(*rows: int) -> Tensor:
    return i32([0, *rows]).cumsum(0, dtype=torch.int32)


def draw_tables(generator: torch.Generator, vocabulary: int, states: int = 6) -> AutomatonTables:
    """State 0 allows nothing; others a few tokens, ranges or both, a token possibly inside a range."""

    def integer(lo: int, hi: int) -> int:
        return int(torch.randint(lo, hi, (), generator=generator))

    tokens: list[list[int]] = [[]]
    ranges: list[list[tuple[int, int, int]]] = [[]]
    for _ in range(1, states):
        tokens.append(sorted({integer(0, vocabulary) for _ in range(integer(0, 5))}))
        cut = sorted(integer(0, vocabulary + 1) for _ in range(4))
        ranges.append([(cut[0], cut[1], 0), (cut[2], cut[3], 0)][: integer(0, 3)])
    flat = [each for state in ranges for each in state]
    return AutomatonTables(
        first=offsets(*map(len, tokens)),
        tokens=i32([token for state in tokens for token in state]),
        targets=torch.zeros(sum(map(len, tokens)), dtype=torch.int32),
        range_first=offsets(*map(len, ranges)),
        ranges=i32(flat).reshape(len(flat), 3),
        renormalise=torch.arange(states) % 2 == 1,
        free=torch.arange(states) % 3 == 0,
    )


def draw_rules(generator: torch.Generator, rows: int, vocabulary: int, which: int, tables: bool) -> StepRules:
    """Every rule whose bit stands in `which`, with values that differ from row to row."""

    def integers(lo: int, hi: int, *shape: int) -> Tensor:
        return torch.randint(lo, hi, shape or (rows,), generator=generator, dtype=torch.int32)

    def chosen(values: Tensor, bit: int) -> Tensor | None:
        return values if which >> bit & 1 else None

    def bools() -> Tensor:
        return integers(0, 2).bool()

    counts = integers(0, 4)
    adjusted = int(counts.sum())
    values = integers(-3, 2, adjusted).float() * 0.5
    rules = StepRules(
        temperature=chosen(integers(1, 5).float() * 0.5, 0),
        live=chosen(integers(0, 4) > 0, 1),
        forced=chosen(integers(-2, vocabulary + 1).where(bools(), i32(-1)), 2),
        no_eos=chosen(bools(), 3),
        repetition_penalty=chosen(1 + integers(0, 3).float() * 0.25, 4),
        history=integers(-1, min(vocabulary, 4) + 1, rows, 4 + which % 5),
        counted_from=chosen(integers(-1, 4), 5),
        ngram=chosen(integers(0, 4), 6),
        unk_penalty=chosen(integers(-2, 3).float() * 0.5, 7),
        states=chosen(integers(-1, 6), 9) if tables else None,
        pad=int(integers(-1, 3)[:1].sum()),
        unk=int(integers(-1, 4)[:1].sum()),
    )
    if which >> 8 & 1:
        rules = dataclasses.replace(
            rules,
            adjust_first=offsets(*counts.tolist()),
            adjust_tokens=integers(-1, vocabulary + 1, adjusted),
            adjust_values=values.masked_fill(values == -1.5, NEVER),
        )
    if rules.states is not None:
        rules = dataclasses.replace(rules, tables=draw_tables(generator, vocabulary))
    return rules


def assert_same(
    have: BeamCandidates, want: BeamCandidates, sums: Tensor, row_offsets: Tensor, uneven: bool = False
) -> None:
    """Tokens, rows and missing candidates are equal, unless two scores are one rounding apart.

    uneven: some tokens of a row take more arithmetic than others (penalties, adjustments), so that equal scores may
    come out a rounding apart within a row too.
    """
    assert have.scores.dtype == torch.float32 and have.tokens.dtype == have.origins.dtype == torch.int32
    missing = want.scores == NEVER
    assert torch.equal(have.scores == NEVER, missing)
    assert (have.tokens[missing] == -1).all() and (have.origins[missing] == 0).all()
    assert (have.log_probs[missing] == NEVER).all()
    close = {"rtol": 3e-7, "atol": 3e-7}
    torch.testing.assert_close(have.scores, want.scores, **close)
    for sample in range(len(have.scores)):
        found = int((~missing[sample]).sum())
        ours, theirs = (list(zip(x.origins[sample, :found].tolist(), x.tokens[sample, :found].tolist(), strict=True))
                        for x in (have, want))  # fmt: skip
        score = dict(zip(theirs, want.log_probs[sample].tolist(), strict=False))
        prob = dict(zip(ours, have.log_probs[sample].tolist(), strict=False))
        assert len(set(ours)) == found
        keys = [(-s, *place) for s, place in zip(have.scores[sample].tolist(), ours, strict=False)]
        assert keys == sorted(keys)
        for place, log_prob in zip(ours, have.log_probs[sample].tolist(), strict=False):
            row = int(row_offsets[sample]) + place[0]
            assert float(sums[row] + torch.tensor(log_prob)) in have.scores[sample].tolist()
            if place in score:
                assert log_prob == pytest.approx(score[place], rel=3e-7, abs=3e-7)
        for row in {place[0] for place in ours}:
            mine, other = ([token for r, token in places if r == row] for places in (ours, theirs))
            common = min(len(mine), len(other))
            assert uneven or mine[:common] == other[:common]
            for one, same in zip(mine, other, strict=False):
                assert prob[row, one] == pytest.approx(score[row, same], rel=3e-7, abs=3e-7)
            # A candidate more or less of a row: only where its score is a rounding away from the last one's.
            for places in (ours, theirs):
                extra = [n for n, place in enumerate(places) if place[0] == row][common:]
                last = float(want.scores[sample, found - 1])
                assert all(float(have.scores[sample, n]) == pytest.approx(last, rel=5e-7, abs=5e-7) for n in extra)


CASES = st.tuples(
    st.integers(0, 2**20),  # seed
    st.sampled_from((1, 2, 3, 5, 70, 255, 256, 257, 700)),  # vocabulary
    st.lists(st.integers(0, 4), min_size=1, max_size=3),  # rows of each sample
    st.sampled_from((1, 2, 4, 10)),  # width
    st.integers(0, 1023),  # rules
    st.sampled_from(DTYPES),
)


def draw_logits(generator: torch.Generator, rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Quarters, so that ties abound; some -inf, though not a whole row of them where tokens may follow."""
    logits = torch.randint(-12, 13, (rows, vocabulary), generator=generator).float() / 4
    if vocabulary > 5:
        logits[torch.rand(rows, vocabulary, generator=generator) < 0.1] = NEVER
    return logits.to(dtype)


def outcome(call: Any) -> Any:
    """What a call returns, or the row it finds at fault."""
    try:
        return call()
    except InvalidLogitsError as error:
        return error.row


def ragged(logits: Tensor, keep: Tensor) -> RaggedLogits:
    return RaggedLogits(logits[keep], offsets(*keep.sum(1).tolist()), keep.nonzero()[:, 1].int(), logits.shape[1])

"""The tolerance bites: the reference keeps the rule in every dtype, and deliberately wrong versions of it do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from harness import DTYPES, Case, Expected, check, expect, make_case, run_backend
from torch import Tensor

from ofakern.ops.attention import RelativeTerm, intervals

REFERENCE = run_backend("reference")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_keeps_the_rule(dtype: torch.dtype) -> None:
    for case in (
        make_case(1, (1,), dtype=dtype),
        make_case(2, (63, 0, 65), mask="window", empty_rows=True, dtype=dtype),
        make_case(3, (31, 40), (65, 7), heads=4, key_heads=2, value_width=24, mask="random", dtype=dtype),
        make_case(4, (), dtype=dtype),
        make_case(5, (3,), (0,), dtype=dtype),
        roomy_case(dtype),
    ):
        assert check(case, REFERENCE) <= 1


def roomy_case(dtype: torch.dtype) -> Case:
    """Two text segments per sample; the tables have a row for every pair, so that wrong versions read wrong rows."""
    case = make_case(7, (50, 79), heads=4, pos_width=16, terms=0, dropout_p=0.1, mask="causal", dtype=dtype)
    n = case.layout.queries
    position = torch.arange(n, dtype=torch.int32)
    term = RelativeTerm(position + n, position, intervals.full([30, 20, 40, 39]), 2 * n + 1)
    layout = replace(case.layout, terms=(term, replace(term, q_coord=n + 3 - position, k_coord=-position)))
    generator = torch.Generator().manual_seed(8)
    return replace(case, layout=layout, tables=tuple(torch.randn(2, 4, 2 * n + 1, generator=generator)))


@cache
def _expected(dtype: torch.dtype) -> tuple[Case, Expected]:
    case = roomy_case(dtype)
    return case, expect(case)


def _moved(case: Case, lo: int, hi: int) -> Case:
    visible = case.layout.visible + torch.tensor([lo, hi], dtype=torch.int32)
    visible = visible.clamp(0, case.layout.keys)
    visible[:, 0] = torch.minimum(visible[:, 0], visible[:, 1])
    return replace(case, layout=replace(case.layout, visible=visible))


def _with_term(case: Case, **changes: Tensor) -> Case:
    first, second = case.layout.terms
    return replace(case, layout=replace(case.layout, terms=(replace(first, **changes), second)))


def _with_options(case: Case, **changes: object) -> Case:
    return replace(case, options=case.options | changes)


WRONG_CALLS: dict[str, Callable[[Case], Case]] = {
    "one key less": lambda case: _moved(case, 0, -1),
    "one key more": lambda case: _moved(case, 0, 1),
    "first key lost": lambda case: _moved(case, 1, 0),
    "table missing": lambda case: replace(case, tables=(torch.zeros_like(case.tables[0]), case.tables[1])),
    "origin plus one": lambda case: _with_term(case, q_coord=case.layout.terms[0].q_coord + 1),
    "same too wide": lambda case: _with_term(case, same=case.layout.visible),
    "heads of the table swapped": lambda case: replace(case, tables=(case.tables[0].flip(0), case.tables[1])),
    "wrong scale": lambda case: _with_options(case, scale=1.05 * case.q.shape[2] ** -0.5),
    "position term lost": lambda case: replace(case, q_pos=torch.zeros_like(case.q)),
    "other dropout mask": lambda case: _with_options(case, dropout_seed=torch.tensor([1, 1])),
    "dropout not rescaled": lambda case: replace(case, v=case.v * (1 - case.options["dropout_p"])),
    "gradient of lse ignored": lambda case: replace(case, dlse=None),
    "head scale left out": lambda case: replace(case, head_scale=torch.ones(4)),
}

WRONG_RESULTS: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "one value unwritten": lambda got: got["out"][3, 1].fill_(torch.nan),
    "lse in base two": lambda got: got["lse"].div_(0.6931),
    "one key's gradient lost": lambda got: got["dk"][20].zero_(),
    "dq without scale": lambda got: got["dq"].mul_(4.0),
    "table gradient one row off": lambda got: got["dtable0"].copy_(got["dtable0"].roll(1, 1)),
    "gradient of one head's scale lost": lambda got: got["dhead_scale"][2:3].zero_(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*WRONG_CALLS, *WRONG_RESULTS])
def test_wrong_versions_break_the_rule(name: str, dtype: torch.dtype) -> None:
    def run(case: Case) -> dict[str, Tensor]:
        if name in WRONG_CALLS:
            return REFERENCE(WRONG_CALLS[name](case))
        got = REFERENCE(case)
        WRONG_RESULTS[name](got)
        return got

    case, expected = _expected(dtype)
    with pytest.raises(AssertionError, match="error .* above|infinities"):
        check(case, run, expected)

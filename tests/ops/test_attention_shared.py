"""Samples that share their positions: the rule on every instruction set, the same bits, and what builds the sets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from harness import DTYPES, Case, assert_same_bits, check, make_case, run_backend
from torch import Tensor

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.ops import native
from ofakern.ops.attention import AttentionLayout, attention, intervals, same_prefixes

CPU, REFERENCE = run_backend("cpu"), run_backend("reference")

CASES: dict[str, dict[str, Any]] = {
    "one set": {"q_lengths": (70, 70, 70), "sets": ((0,) * 3, (0,) * 3), "pos_width": 16, "terms": 2},
    "prefixes, causal": {"q_lengths": (5, 130, 0, 64), "sets": ((0,) * 4, (0,) * 4), "pos_width": 24, "mask": "causal"},
    "several sets": {
        "q_lengths": (33, 17, 20, 40, 1),
        "sets": ((1, 0, 1, 0, 2), (1, 0, 1, 0, 2)),
        "pos_width": 16,
        "mask": "window",
    },
    "cross, queries shared by two sets of keys": {
        "q_lengths": (9, 12, 9),
        "k_lengths": (65, 30, 40),
        "sets": ((0, 0, 0), (0, 1, 0)),
        "pos_width": 40,
    },
    "a set of more samples than go together": {
        "q_lengths": (3, 20, 18, 7, 20, 1, 0, 19, 20, 11, 12, 20),
        "sets": ((0,) * 12, (0,) * 12),
        "pos_width": 8,
        "heads": 5,
    },
    "everything": {
        "q_lengths": (33, 0, 64, 20),
        "k_lengths": (40, 10, 0, 30),
        "sets": ((0, 0, 0, 1), (0, 0, 0, 0)),
        "heads": 6,
        "key_heads": 2,
        "value_width": 24,
        "pos_width": 32,
        "terms": 2,
        "dropout_p": 0.3,
        "empty_rows": True,
        "strides": "fused",
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_keep_the_rule(isa: str, name: str, dtype: torch.dtype) -> None:
    check(make_case(1, **CASES[name], dtype=dtype), CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_blocks_and_tiles(cpu: Any, dtype: torch.dtype) -> None:
    sets = ((0,) * 4, (0,) * 4)
    check(make_case(2, (300, 270, 300, 40), heads=4, pos_width=16, sets=sets, dtype=dtype), CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_keeps_the_rule(dtype: torch.dtype) -> None:
    for arguments in CASES.values():
        check(make_case(3, **arguments, dtype=dtype), REFERENCE)


def test_wrong_versions_break_the_rule() -> None:
    case = make_case(4, (30, 30), heads=2, pos_width=16, sets=((0, 0), (0, 0)))

    def without_one_sample(case: Case) -> dict[str, Tensor]:
        got = CPU(case)
        got["dq_pos"] *= 0.5
        return got

    def other_rows(case: Case) -> dict[str, Tensor]:
        assert case.q_pos is not None
        return CPU(replace(case, q_pos=case.q_pos.roll(1, 0)))

    for wrong in (without_one_sample, other_rows):
        with pytest.raises(AssertionError, match="error .* above"):
            check(case, wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads_or_repetition(isa: str, dtype: torch.dtype) -> None:
    arguments = CASES["a set of more samples than go together"] | {"dropout_p": 0.2, "terms": 2}
    case = make_case(5, **arguments, dtype=dtype)
    torch.set_num_threads(1)
    first = CPU(case)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert_same_bits(CPU(case), first)


def test_scores_that_grow_from_tile_to_tile(isa: str) -> None:
    """A row's dot products are computed again when its sums pass a limit: onto the positions' products, too."""
    case = make_case(6, (40, 40), (600, 600), width=16, pos_width=16, sets=((0, 0), (0, 0)))
    assert case.q_pos is not None and case.k_pos is not None
    case.q_pos[:, :, 0] = 1.0
    case.k_pos[:, :, 0] = torch.linspace(-1, 1, 600)[:, None] * 320
    check(case, CPU)


def test_shared_rows_give_what_rows_of_their_own_give(cpu: Any) -> None:
    case = make_case(7, (30, 21, 30), heads=2, pos_width=16, sets=((0, 0, 1), (0, 0, 1)))
    q_pos, k_pos = case.token_positions()
    spelled_out = replace(case, q_pos=q_pos, k_pos=k_pos, layout=replace(case.layout, shared=None))
    with_rows, with_sets = CPU(spelled_out), CPU(case)
    for name in ("out", "lse", "dq", "dk", "dv", "dtable0"):
        torch.testing.assert_close(with_sets[name], with_rows[name], rtol=1e-4, atol=1e-5)
    shared = case.layout.shared
    assert shared is not None
    for name, index, rows in (("dq_pos", shared.q_index, 60), ("dk_pos", shared.k_index, 60)):
        summed = torch.zeros(rows, 2, 16).index_add_(0, index.long(), with_rows[name])
        torch.testing.assert_close(with_sets[name], summed, rtol=1e-4, atol=1e-5)


def test_compile_full_graph(cpu: Any) -> None:
    case = make_case(8, (9, 5), width=8, pos_width=8, terms=1, sets=((0, 0), (0, 0)), unread_nan=False)

    def loss(case: Case, layout: AttentionLayout) -> Tensor:
        out = attention(case.q, case.k, case.v, layout, case.q_pos, case.k_pos, case.tables, backend="cpu")
        return (out * case.dout).sum()

    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(case, case.layout), loss(case, case.layout))


def build(**changes: Any) -> AttentionLayout:
    defaults = {"visible": intervals.full([2, 3]), "q_lengths": [2, 3], "k_lengths": [2, 3]}
    return AttentionLayout.build(**(defaults | changes))


def test_layout() -> None:
    layout = build(q_sets=[0, 0], k_sets=[1, 0])
    assert layout.shared is not None
    assert layout.shared.sets.tolist() == [[0, 1, 0, 0], [1, 2, 0, 3]]
    assert layout.shared.members.tolist() == [1, 0]
    assert (layout.shared.q_rows, layout.shared.k_rows) == (3, 5)
    assert layout.shared.q_index.tolist() == [0, 1, 0, 1, 2]
    assert layout.shared.k_index.tolist() == [3, 4, 0, 1, 2]
    empty = AttentionLayout.build(intervals.full([]), [], [], q_sets=[], k_sets=[])
    assert empty.shared is not None and empty.shared.sets.shape == (0, 4)
    assert build().shared is None


@pytest.mark.parametrize(
    ("kind", "words", "changes"),
    [
        (OfakernValueError, "k_sets must be given together with q_sets, got None", {"q_sets": [0, 0]}),
        (OfakernValueError, r"q_sets must be one per sample \(2\), got 1", {"q_sets": [0], "k_sets": [0, 0]}),
        (OfakernTypeError, "k_sets must be integers, got float64", {"q_sets": [0, 0], "k_sets": [0.0, 0.5]}),
        (OfakernValueError, "q_sets must number the sets 0, 1, ... without", {"q_sets": [0, 2], "k_sets": [0, 0]}),
        (
            OfakernValueError,
            r"visible must lie inside each sample's own keys .* got keys \[0, 5\] for sample 1 of keys \[2, 5\]",
            {
                "q_sets": [0, 0],
                "k_sets": [0, 0],
                "visible": torch.tensor([[0, 2]] * 2 + [[0, 5]] * 3, dtype=torch.int32),
            },
        ),
    ],
)
def test_refusals_of_the_layout(kind: type[Exception], words: str, changes: dict[str, Any]) -> None:
    with pytest.raises(kind, match=words):
        build(**changes)


def test_refusals_of_a_call(cpu: Any) -> None:
    case = make_case(9, (4, 4), pos_width=8, sets=((0, 0), (0, 0)))
    with pytest.raises(OfakernValueError, match=r"q_pos must have shape \[shared.q_rows=4,H=2,P=8\], got \[8, 2, 8\]"):
        attention(case.q, case.k, case.v, case.layout, case.q[:, :, :8], case.k[:, :, :8], case.tables, backend="cpu")


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("shared.sets must take the members one after the other", {"sets": [[0, 1, 0, 0], [0, 2, 0, 0]]}),
        ("shared.sets must take every member, got 1", {"sets": [[0, 1, 0, 0]]}),
        ("shared.members must have every sample once", {"members": [0, 0]}),
        ("shared.members must have every sample once", {"members": [0, 2]}),
        ("q_pos must have the rows of every set", {"sets": [[0, 2, 1, 0]]}),
        ("k_pos must have the rows of every set", {"sets": [[0, 2, 0, 1]]}),
    ],
)
def test_the_binding_refuses_what_it_could_not_index(words: str, changes: dict[str, Any]) -> None:
    case = make_case(10, (4, 4), pos_width=8, terms=0, sets=((0, 0), (0, 0)))
    assert case.layout.shared is not None
    wrong = {name: torch.tensor(value, dtype=torch.int32) for name, value in changes.items()}
    layout = replace(case.layout, shared=replace(case.layout.shared, **wrong))
    with pytest.raises(OfakernValueError, match=words):
        attention(case.q, case.k, case.v, layout, case.q_pos, case.k_pos, backend="cpu")
    assert native.cpu is not None


def test_same_prefixes() -> None:
    codes = np.array([7, 8, 9, 7, 8, 7, 9, 7, 8, 9, 4])
    sets, longest = same_prefixes(codes, np.array([3, 2, 2, 0, 4]))
    assert longest == [2, 3, 4]
    assert sets == [2, 2, 0, 1, 2]
    assert same_prefixes(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)) == ([], [])

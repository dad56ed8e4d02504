"""Layouts and intervals: values against small loops, every refusal with its words, and the time of a build."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from harness import make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from short import examples
from torch import Tensor
from torch.utils import _pytree

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.ops.attention import AttentionLayout, RelativeTerm, intervals, intervals_from_mask


def rows(tensor: Tensor) -> list[list[int]]:
    return tensor.tolist()


def test_interval_builders() -> None:
    lengths = [2, 0, 3]
    assert rows(intervals.full(lengths)) == [[0, 2], [0, 2], [2, 5], [2, 5], [2, 5]]
    assert rows(intervals.causal(torch.tensor(lengths))) == [[0, 1], [0, 2], [2, 3], [2, 4], [2, 5]]
    assert rows(intervals.prefix_lm(lengths, [1, 0, 2])) == [[0, 1], [0, 2], [2, 4], [2, 4], [2, 5]]
    assert rows(intervals.sliding_window(lengths, 1)) == [[0, 1], [0, 2], [2, 3], [2, 4], [3, 5]]
    assert rows(intervals.cross([1, 2, 1], [3, 0, 2])) == [[0, 3], [3, 3], [3, 3], [3, 5]]
    assert rows(intervals.full([])) == []
    assert intervals.causal([3]).dtype == torch.int32


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 5, 2), (3, 0, 2), (2, 3, 0), (0, 3, 4)])
def test_even_layouts_are_what_build_makes(shape: tuple[int, int, int]) -> None:
    samples, queries, keys = shape
    q_lengths, k_lengths = [queries] * samples, [keys] * samples
    built = AttentionLayout.build(intervals.cross(q_lengths, k_lengths), q_lengths, k_lengths)
    even = AttentionLayout.even(samples, queries, keys, "cpu")
    for mine, other in zip(_pytree.tree_leaves(even), _pytree.tree_leaves(built), strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other) and mine.is_contiguous()


def test_prefix_keys_renumber_the_keys() -> None:
    lengths = [2, 1]
    visible = intervals.with_prefix_keys(intervals.causal(lengths), lengths, lengths, 3, visible=True)
    assert rows(visible) == [[0, 4], [0, 5], [5, 9]]
    same = intervals.with_prefix_keys(intervals.full(lengths), lengths, lengths, 3, visible=False)
    assert rows(same) == [[3, 5], [3, 5], [8, 9]]
    AttentionLayout.build(visible, lengths, [n + 3 for n in lengths])
    with pytest.raises(OfakernValueError, match=r"intervals\[2\] must begin at its sample's first key 0, got \(1, 3\)"):
        intervals.with_prefix_keys(intervals.sliding_window([3], 1), [3], [3], 2, visible=True)


def test_mask_to_intervals() -> None:
    mask = torch.tensor([[[1, 1, 0], [0, 1, 1], [0, 0, 0]], [[1, 1, 1], [0, 0, 1], [1, 0, 0]]], dtype=torch.bool)
    assert rows(intervals_from_mask(mask)) == [[0, 2], [1, 3], [0, 0], [3, 6], [5, 6], [3, 4]]
    assert rows(intervals_from_mask(mask[:, None].expand(2, 4, 3, 3))) == rows(intervals_from_mask(mask))
    assert rows(intervals_from_mask(torch.zeros(2, 3, 0, dtype=torch.bool))) == [[0, 0]] * 6
    holed = mask.clone()
    holed[1, 2, 2] = True
    with pytest.raises(OfakernValueError, match="one run of keys per query, got holes in sample 1, query 2"):
        intervals_from_mask(holed)
    with pytest.raises(OfakernValueError, match="the same for every head"):
        intervals_from_mask(torch.stack([mask, ~mask], 1))
    with pytest.raises(OfakernTypeError, match="mask must be a bool tensor, got torch.float32"):
        intervals_from_mask(mask.float())


def test_derived_fields() -> None:
    visible = torch.tensor([[1, 3], [2, 2], [5, 7], [0, 0], [0, 7]], dtype=torch.int32)
    layout = AttentionLayout.build(visible[:4], [2, 1, 0, 1], [4, 1, 1, 1])
    assert rows(layout.k_range) == [[1, 3], [5, 7], [0, 0], [0, 0]]
    assert layout.key_seen.tolist() == [0, 1, 1, 0, 0, 1, 1]
    assert layout.q_offsets.tolist() == [0, 2, 3, 3, 4]
    assert layout.k_offsets.tolist() == [0, 4, 5, 6, 7]
    assert (layout.queries, layout.keys, layout.samples) == (4, 7, 4)


@settings(max_examples=examples(60), deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 20), max_size=3), st.sampled_from(["full", "causal", "random"]))
def test_table_bounds_are_exact(seed: int, lengths: list[int], mask: str) -> None:
    """make_case sizes tables to the pair: one row less at either end must be refused, and nothing else."""
    layout = make_case(seed, tuple(lengths), mask=mask, empty_rows=True).layout
    term, counts = layout.terms[0], lengths
    used = bool(_active(layout, term).any())
    assert AttentionLayout.build(layout.visible, counts, counts, [replace(term, rows=term.rows)]).terms
    for wrong in (replace(term, rows=term.rows - 1), replace(term, q_coord=term.q_coord - 1)):
        if used:
            with pytest.raises(OfakernValueError, match=r"terms\[0\] must read rows within \[0, "):
                AttentionLayout.build(layout.visible, counts, counts, [wrong])
        elif wrong.rows == term.rows - 1:
            AttentionLayout.build(layout.visible, counts, counts, [wrong])


def _active(layout: AttentionLayout, term: RelativeTerm) -> np.ndarray:
    j = np.arange(layout.keys)
    lo = np.maximum(layout.visible[:, 0].numpy(), term.same[:, 0].numpy())
    hi = np.minimum(layout.visible[:, 1].numpy(), term.same[:, 1].numpy())
    active: np.ndarray = (lo[:, None] <= j) & (j < hi[:, None])
    return active


def _term(**changes: Any) -> RelativeTerm:
    n = torch.arange(4, dtype=torch.int32)
    return replace(RelativeTerm(n + 3, n, intervals.full([4]), 7), **changes)


@pytest.mark.parametrize(
    ("kind", "words", "changes"),
    [
        (OfakernValueError, r"visible\[2\] must satisfy 0 <= lo <= hi <= Nk = 4, got \(0, 5\)", {"cell": (2, 1, 5)}),
        (OfakernValueError, r"visible\[1\] must satisfy 0 <= lo <= hi <= Nk = 4, got \(-1, 4\)", {"cell": (1, 0, -1)}),
        (OfakernValueError, r"visible\[3\] must satisfy 0 <= lo <= hi <= Nk = 4, got \(3, 2\)", {"rows": (3, [3, 2])}),
        (OfakernTypeError, "visible must be an int32 tensor, got torch.int64", {"visible": torch.zeros(4, 2).long()}),
        (OfakernTypeError, "visible must be an int32 tensor, got ndarray", {"visible": np.zeros((4, 2), np.int32)}),
        (
            OfakernValueError,
            r"visible must have shape \[Nq=4,2\], got \[3, 2\]",
            {"visible": torch.zeros(3, 2, dtype=torch.int32)},
        ),
        (OfakernValueError, "q_lengths must be at least 0, got -1", {"q_lengths": [5, -1]}),
        (OfakernTypeError, "q_lengths must be integers, got float64", {"q_lengths": [4.0]}),
        (OfakernValueError, r"k_lengths must have one number per sample \(1\), got 2", {"k_lengths": [2, 2]}),
        (OfakernValueError, "terms must be at most two, got 3", {"terms": [_term()] * 3}),
        (OfakernTypeError, r"terms\[0\] must be a RelativeTerm, got tuple", {"terms": [(1, 2)]}),
        (OfakernTypeError, r"terms\[0\].q_coord must be an int32", {"terms": [_term(q_coord=torch.zeros(4))]}),
        (OfakernValueError, r"terms\[0\].k_coord must have shape", {"terms": [_term(k_coord=torch.zeros(3).int())]}),
        (OfakernValueError, r"terms\[0\].same\[0\] must satisfy", {"terms": [_term(same=intervals.full([4]) + 1)]}),
        (
            OfakernValueError,
            r"terms\[0\] must read rows within \[0, 6\), got rows 3..6 at query 3 \(all queries: 0..6\)",
            {"terms": [_term(rows=6)]},
        ),
        (
            OfakernValueError,
            r"terms\[0\] must read rows within \[0, 7\), got rows -1..2 at query 0",
            {"terms": [_term(q_coord=torch.arange(4).int() + 2)]},
        ),
        (OfakernTypeError, r"terms\[0\].rows must be an int, got float", {"terms": [_term(rows=7.0)]}),
    ],
)
def test_wrong_layouts_are_refused(kind: type[Exception], words: str, changes: dict[str, Any]) -> None:
    visible = intervals.full([4])
    if "cell" in changes:
        i, side, value = changes.pop("cell")
        visible[i, side] = value
    if "rows" in changes:
        i, value = changes.pop("rows")
        visible[i] = torch.tensor(value)
    arguments = {"visible": visible, "q_lengths": [4], "k_lengths": [4]} | changes
    with pytest.raises(kind, match=words):
        AttentionLayout.build(**arguments)


def test_coordinates_near_the_integer_limits_do_not_wrap() -> None:
    big = 2**31 - 1
    term = _term(q_coord=torch.full((4,), big, dtype=torch.int32), k_coord=torch.full((4,), -big, dtype=torch.int32))
    with pytest.raises(OfakernValueError, match=f"got rows {2 * big}..{2 * big}"):
        AttentionLayout.build(intervals.full([4]), [4], [4], [term])


def test_layout_travels() -> None:
    layout = AttentionLayout.build(intervals.full([4]), [4], [4], [_term()])
    assert layout.to("cpu") is layout
    leaves, spec = _pytree.tree_flatten(layout)
    again = _pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, AttentionLayout) and again.terms[0].rows == 7
    meta = layout.to("meta")
    assert meta.device.type == "meta" and meta.terms[0].same.device.type == "meta"


def test_building_2048_tokens_is_quick() -> None:
    n = 2048
    position = torch.arange(n, dtype=torch.int32)
    term = RelativeTerm(position + n, position, intervals.full([900, 124] * 2), 2 * n)
    visible = intervals.causal([n // 2] * 2)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        AttentionLayout.build(visible, [n // 2] * 2, [n // 2] * 2, [term, term])
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3, f"{min(times) * 1e3:.2f} ms (about 0.8 on an idle core)"

"""Relative blocks against the published bucket functions, and the unfolding's gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.nn import relative as R

TABLES = Path(__file__).parents[1] / "golden" / "ofasys" / "extra" / "bucket_tables.npz"


@pytest.fixture(scope="module")
def tables() -> dict[str, Tensor]:
    with np.load(TABLES) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.mark.parametrize(
    ("name", "bucket", "longest"),
    [
        ("token_256_1024", 256, 1024),
        ("token_16_128", 16, 128),
        ("video_256_1024", 256, 1024),
        ("audio_1024_4096", 1024, 4096),
        ("audio_128_4096", 128, 4096),
    ],
)
def test_text_buckets_are_the_published_ones(tables: dict[str, Tensor], name: str, bucket: int, longest: int) -> None:
    recorded = tables[name]
    length = (len(recorded) + 1) // 2
    block = R.text_block(length, bucket, longest)
    assert torch.equal(block.index, recorded)
    assert block.dmin == -(length - 1) and block.order is None
    causal = R.text_block(length, bucket, longest, causal=True)
    assert torch.equal(causal.index, recorded[length - 1 :]) and causal.dmin == 0


@pytest.mark.parametrize(("name", "bucket"), [("image_42", 42), ("image_10", 10)])
def test_image_buckets_are_the_published_ones(tables: dict[str, Tensor], name: str, bucket: int) -> None:
    recorded = tables[name]
    grid = R.grid_block(bucket, bucket, bucket)
    own = R.grid_coordinates(bucket, bucket)
    assert torch.equal(grid.index[own[:, None] - own - grid.dmin], recorded[1:, 1:])

    extent = R.grid_extent(bucket, bucket)
    special = R.with_special(grid, R.SpecialRows.of_image(bucket))
    q, k = (torch.cat([torch.tensor([c]), own]) for c in R.special_coordinates(extent))
    assert torch.equal(special.index[q[:, None] - k - special.dmin], recorded)
    assert special.rows == 5 * extent + 4 and special.order is None

    causal = R.causal_with_special(grid, R.SpecialRows.of_image(bucket))
    q, k = (torch.cat([torch.tensor([c]), own]) for c in R.causal_special_coordinates(extent))
    seen = torch.ones_like(recorded).tril().bool()
    assert torch.equal(causal.index[(q[:, None] - k)[seen]], recorded[seen])
    assert causal.rows == 2 * extent + 3


def test_a_grid_smaller_than_the_bucket_reads_the_right_rows() -> None:
    height, width, bucket = 3, 4, 6
    block = R.grid_block(height, width, bucket)
    own = R.grid_coordinates(height, width)
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    dy, dx = y[:, None] - y, x[:, None] - x
    expected = (dy + bucket - 1) * (2 * bucket - 1) + dx + bucket - 1
    assert torch.equal(block.index[own[:, None] - own - block.dmin], expected)


def test_unfolding_gives_rows_in_the_blocks_order() -> None:
    text, grid = R.text_block(5, 4, 16), R.grid_block(2, 2, 3)
    a, b = torch.randn(7, 2), torch.randn(28, 2)
    table = R.unfold([a, b], [text, grid])
    assert table.shape == (2, text.rows + grid.rows) and table.dtype == torch.float32
    assert torch.equal(table[:, : text.rows], a[text.index].T)
    assert torch.equal(table[:, text.rows :], b[grid.index].T)
    assert grid.origin(text.rows) + grid.dmin == text.rows


def test_the_gradient_is_the_sum_of_a_rows_uses() -> None:
    blocks = [R.text_block(40, 4, 64), R.RelativeBlock.build(torch.tensor([1, 0, 1, 2, 0]), -2)]
    assert blocks[0].order is None and blocks[1].order is not None
    weights = [torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) for rows in (7, 4)]
    assert torch.autograd.gradcheck(lambda *w: R.unfold(w, blocks), weights)


def test_the_gradient_has_the_parameters_dtype_and_the_same_bits() -> None:
    block = R.text_block(300, 8, 512)
    weight = torch.randn(15, 4).bfloat16().requires_grad_()
    grad = torch.randn(4, block.rows)
    runs = []
    for _ in range(3):
        weight.grad = None
        R.unfold([weight], [block]).backward(grad)
        assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
        runs.append(weight.grad)
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize(
    "call",
    [
        lambda: R.text_block(17, 4, 16),
        lambda: R.grid_block(7, 2, 6),
        lambda: R.grid_block(0, 2, 6),
        lambda: R.unfold([], []),
        lambda: R.RelativeBlock.build(torch.zeros(3), 0),
        lambda: R.with_special(R.text_block(4, 4, 16, causal=True), R.SpecialRows(0, 1, 2)),
    ],
)
def test_what_does_not_fit_is_refused(call: object) -> None:
    with pytest.raises(OfakernValueError, match="must"):
        call()  # type: ignore[operator]

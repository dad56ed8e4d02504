"""Boxes and bins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ofakern.errors import DataError
from ofakern.modality.box.preprocess import BoxCoder, parse_box


def test_golden_bins() -> None:
    coder = BoxCoder(64, bins=32, max_image_size=64)
    assert coder.encode((10, 5, 60, 40), (80, 56)) == [4, 3, 23, 22]
    assert coder.encode((0, 20, 79, 55), (80, 56)) == [0, 11, 31, 30]
    assert coder.encode((30, 2, 79, 33), (80, 56)) == [12, 1, 31, 18]


def test_original_scale_of_512_pixels() -> None:
    assert BoxCoder(512).encode((0, 0, 256, 512), (512, 512)) == [0, 0, 500, 999]  # 499.5 rounds to even
    assert BoxCoder(480).encode((0, 0, 480, 480), (480, 480)) == [0, 0, 937, 937]


@given(
    size=st.tuples(st.integers(2, 2000), st.integers(2, 2000)),
    shares=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    bins=st.integers(2, 1000),
)
def test_decode_is_within_half_a_bin(size: tuple[int, int], shares: list[float], bins: int) -> None:
    coder = BoxCoder(64, bins=bins, max_image_size=64)
    x0, x1 = sorted((shares[0] * size[0], shares[1] * size[0]))
    y0, y1 = sorted((shares[2] * size[1], shares[3] * size[1]))
    codes = coder.encode((x0, y0, x1, y1), size)
    assert all(0 <= k < bins for k in codes)
    back = coder.decode(codes, size)
    for value, old, extent in zip(back, (x0, y0, x1, y1), size * 2, strict=True):
        assert abs(value - old) <= extent / (bins - 1) / 2 + 1e-6


def test_decoded_corners_are_in_order_and_inside() -> None:
    box = BoxCoder(32, bins=32, max_image_size=64).decode([31, 20, 0, 3], (100, 100))
    assert list(box) == pytest.approx([0.0, 3 * 2 / 31 * 100, 100.0, 100.0])


@pytest.mark.parametrize(
    "value",
    [
        "1,2,30,40",
        "1 2 30 40",
        [1, 2, 30, 40],
        (1.0, 2, 30, 40),
        np.array([1, 2, 30, 40]),
        torch.tensor([1, 2, 30, 40]),
    ],
)
def test_kinds_of_boxes(value: object) -> None:
    assert parse_box(value, size=(30, 40)) == (1, 2, 30, 40)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1,2,3", "four numbers"),
        ("a,b,c,d", "four numbers"),
        ([1, 2, None, 4], "four numbers"),
        (5, "got int"),
        (b"1,2,3,4", "got bytes"),
        ([1, 2, math.nan, 4], "finite"),
        ([3, 2, 3, 4], "x0 < x1"),
        ([0, 5, 3, 4], "y0 < y1"),
        ([0, 0, 31, 4], r"inside the image \(30 x 40 pixels\)"),
        ([-1, 0, 3, 4], "inside the image"),
        (np.zeros((2, 4)), "four numbers"),
    ],
)
def test_bad_boxes(value: object, message: str) -> None:
    with pytest.raises(DataError, match=f"^b: box.*{message}"):
        parse_box(value, where="b", size=(30, 40))


def test_coder_options_are_checked() -> None:
    with pytest.raises(DataError, match="at least image_size"):
        BoxCoder(640, max_image_size=512)
    with pytest.raises(DataError, match="at least 2"):
        BoxCoder(64, bins=1)

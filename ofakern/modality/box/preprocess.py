"""Boxes: `x0,y0,x1,y1` in pixels of the original image to four `<bin>_k` tokens.

The box is squeezed to the model's square image together with it, then quantised on a scale of `max_image_size` pixels
(OFA, OFASys: 512, whatever the image size; so at 480 pixels their bins end at 937).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ofakern.errors import DataError

__all__ = ["Box", "BoxCoder", "parse_box"]

Box = tuple[float, float, float, float]


def parse_box(value: Any, *, where: str = "box", size: tuple[int, int] | None = None) -> Box:
    """Four numbers from `"x0,y0,x1,y1"` or a sequence of four.

    size: (width, height) of the image the box must lie in. Raises DataError, naming `where`, for anything else:
    not four finite numbers, no area, outside the image.
    """
    parts = _four(value, where)
    try:
        x0, y0, x1, y1 = (float(part) for part in parts)
    except (TypeError, ValueError):
        raise DataError(f"{where}: box must be four numbers x0,y0,x1,y1, got {value!r}") from None
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise DataError(f"{where}: box must be finite, got {value!r}")
    if x0 >= x1 or y0 >= y1:
        raise DataError(f"{where}: box must have x0 < x1 and y0 < y1, got {value!r}")
    if size is not None and (x0 < 0 or y0 < 0 or x1 > size[0] or y1 > size[1]):
        raise DataError(f"{where}: box must lie inside the image ({size[0]} x {size[1]} pixels), got {value!r}")
    return x0, y0, x1, y1


@dataclass(frozen=True)
class BoxCoder:
    """Box <-> bins.

    image_size: side S of the model's square image; bins: number of bins; max_image_size: the pixels that the last bin
    stands for, at least S.
    """

    image_size: int
    bins: int = 1000
    max_image_size: int = 512

    def __post_init__(self) -> None:
        if self.max_image_size < self.image_size:
            raise DataError(
                f"BoxCoder: max_image_size must be at least image_size ({self.image_size}), got {self.max_image_size}"
            )
        if self.bins < 2:
            raise DataError(f"BoxCoder: bins must be at least 2, got {self.bins}")

    def encode(self, box: Box, size: tuple[int, int]) -> list[int]:
        """Four bin numbers in [0, bins).

        size: (width, height) of the original image. Halves round to even, as torch does.
        """
        scale = self.image_size * (self.bins - 1) / self.max_image_size
        width, height = size
        return [round(coord / extent * scale) for coord, extent in zip(box, (width, height) * 2, strict=True)]

    def decode(self, bins: Sequence[int], size: tuple[int, int]) -> Box:
        """The box in pixels of the original image, cut to it; corners are put in order."""
        scale = self.max_image_size / (self.bins - 1) / self.image_size
        width, height = size
        x0, y0, x1, y1 = (
            min(max(k * scale * extent, 0.0), float(extent))
            for k, extent in zip(bins, (width, height) * 2, strict=True)
        )
        return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _four(value: Any, where: str) -> list[Any]:
    if isinstance(value, str):
        parts: list[Any] = value.replace(",", " ").split()
    elif isinstance(value, (np.ndarray, Tensor)):
        parts = list(value.tolist()) if value.ndim == 1 else []
    elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        parts = list(value)
    else:
        raise DataError(f"{where}: box must be 'x0,y0,x1,y1' or four numbers, got {type(value).__name__}")
    if len(parts) != 4:
        raise DataError(f"{where}: box must be four numbers x0,y0,x1,y1, got {value!r}")
    return parts

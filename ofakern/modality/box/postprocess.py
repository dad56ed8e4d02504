"""Bins of a box slot back to a box in pixels of the original image."""

from __future__ import annotations

from collections.abc import Sequence

from ofakern.modality.box.preprocess import Box, BoxCoder
from ofakern.text import Vocabulary

__all__ = ["decode_box"]


def decode_box(ids: Sequence[int], vocabulary: Vocabulary, coder: BoxCoder, size: tuple[int, int]) -> Box | None:
    """The box of four `<bin>` tokens; None when they are not four bins (a search without constraint may give others).

    size: (width, height) of the original image in pixels.
    """
    bins = vocabulary.range("bin")
    if len(ids) != 4 or any(i not in bins for i in ids):
        return None
    return coder.decode([i - bins.start for i in ids], size)

"""Text slots: tokens of a slot, and the noise that training puts on a model's inputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ofakern.errors import DataError
from ofakern.text import Tokenizer, Vocabulary

__all__ = ["corrupt", "encode_text", "infill", "replace_random"]

POISSON_LAMBDA = 3.0
"""Mean length of a masked span (BART)."""


def encode_text(
    value: Any,
    tokenizer: Tokenizer,
    *,
    uncased: bool = False,
    no_punctuation: bool = False,
    max_length: int | None = None,
    where: str = "text",
) -> list[int]:
    """Vocabulary indices of one text value. Numbers are written out; anything else is a DataError."""
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: text must be a string, got {type(value).__name__}")
    if any("\ud800" <= char <= "\udfff" for char in value):  # half of a pair, as damaged JSON escapes leave it
        raise DataError(f"{where}: text must be valid Unicode, got a lone surrogate in {value[:40]!r}")
    return tokenizer.encode(value, uncased=uncased, no_punctuation=no_punctuation, max_length=max_length)


def corrupt(
    ids: list[int],
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    *,
    noise_ratio: float = 0.0,
    mask_ratio: float = 0.0,
    keep_length: bool = False,
) -> list[int]:
    """Noise, then masks: what training puts on the inputs of a slot (OFASys's order). The labels stay clean."""
    if noise_ratio > 0:
        ids = replace_random(ids, vocabulary, rng, noise_ratio)
    if mask_ratio > 0:
        ids = infill(ids, vocabulary, rng, mask_ratio, keep_length=keep_length)
    return ids


def replace_random(ids: list[int], vocabulary: Vocabulary, rng: np.random.Generator, ratio: float) -> list[int]:
    """Each token, with probability `ratio`, becomes a uniformly drawn text token."""
    text = vocabulary.range("text")
    drawn = rng.integers(text.start, text.stop, size=len(ids))
    hit = rng.random(len(ids)) < ratio
    return [int(new) if yes else old for old, new, yes in zip(ids, drawn, hit, strict=True)]


def infill(
    ids: list[int], vocabulary: Vocabulary, rng: np.random.Generator, ratio: float, *, keep_length: bool = False
) -> list[int]:
    """Text infilling (BART, one mask per masked token as in OFASys).

    ceil(ratio n) tokens are covered by spans whose lengths are drawn from Poisson(3); a span of length 0 inserts a
    mask. keep_length: insert nothing (decoder inputs must stay aligned with their labels).
    """
    if not ids:
        return ids
    spans, insertions = _span_lengths(math.ceil(ratio * len(ids)), rng)
    mask = vocabulary.mask
    out = list(ids)
    for start, length in zip(rng.permutation(len(ids)), spans, strict=False):
        stop = min(int(start) + length, len(ids))
        out[start:stop] = [mask] * (stop - int(start))
    if keep_length or insertions == 0:
        return out
    places = rng.choice(len(out) + insertions, size=insertions, replace=False)
    rest = iter(out)
    inserted = set(places.tolist())
    return [mask if i in inserted else next(rest) for i in range(len(out) + insertions)]


def _span_lengths(total: int, rng: np.random.Generator) -> tuple[list[int], int]:
    """Positive span lengths that sum to `total`, and how many spans of length 0 were drawn with them."""
    spans: list[int] = []
    zeros = 0
    left = total
    while left > 0:
        length = min(int(rng.poisson(POISSON_LAMBDA)), left)
        if length == 0:
            zeros += 1
        else:
            spans.append(length)
            left -= length
    return spans, zeros

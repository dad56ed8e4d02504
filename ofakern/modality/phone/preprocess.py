"""Phones: names separated by blanks, each a token of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ofakern.errors import DataError
from ofakern.text import Vocabulary

__all__ = ["encode_phones", "mask_phones", "phone_names"]

UNKNOWN = "<phone>_unk"
_EDGES = ("<phone>_dict_begin", "<phone>_dict_end")
# Of the masked phones, how many become a random one instead of the unknown one (OFASys).
_RANDOM_SHARE = 0.1


def encode_phones(value: Any, vocabulary: Vocabulary, *, where: str = "phones") -> list[int]:
    """Vocabulary indices of `"K AE1 T"` or of a list of names; an unknown phone becomes `<phone>_unk`.

    Raises DataError for anything else and for no phones at all.
    """
    names = value.split() if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names) or not names:
        raise DataError(f"{where}: phones must be names separated by blanks, got {value!r}")
    unknown = vocabulary.index(UNKNOWN)
    return [vocabulary.indices.get(f"<phone>_{name}", unknown) for name in names]


def mask_phones(ids: list[int], vocabulary: Vocabulary, rng: np.random.Generator, ratio: float) -> list[int]:
    """ceil(ratio n) phones, drawn at random, become `<phone>_unk`, a tenth of those any phone."""
    if not ids:
        return ids
    chosen = rng.permutation(len(ids))[: math.ceil(ratio * len(ids))]
    known = phone_ids(vocabulary)
    out = list(ids)
    for place in chosen:
        is_random = rng.random() < _RANDOM_SHARE
        out[place] = known[int(rng.integers(len(known)))] if is_random else vocabulary.index(UNKNOWN)
    return out


def phone_ids(vocabulary: Vocabulary) -> range:
    """The indices of real phones. The group's first symbol and its last two are marks."""
    group = vocabulary.range("phone")
    return range(group.start + 1, group.stop - 2)


def phone_names(ids: Sequence[int], vocabulary: Vocabulary) -> str:
    """Phones as text; marks that are no sound are left out."""
    symbols = (vocabulary.symbol(index) for index in ids)
    return " ".join(symbol.removeprefix("<phone>_") for symbol in symbols if symbol not in _EDGES)

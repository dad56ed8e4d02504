"""Phones to tokens and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ofakern.errors import DataError
from ofakern.modality.phone.preprocess import encode_phones, mask_phones, phone_ids, phone_names
from ofakern.text import Vocabulary

V = Vocabulary.build(range(4), codes=0, bins=0, phones=["K", "AE1", "T", "|"])
UNKNOWN = V.index("<phone>_unk")


def test_there_and_back() -> None:
    ids = encode_phones("K AE1  T | K", V)
    assert ids == [V.index(f"<phone>_{name}") for name in ("K", "AE1", "T", "|", "K")]
    assert encode_phones(["K", "T"], V) == encode_phones("K T", V)
    assert encode_phones("K QQ", V)[1] == UNKNOWN
    assert phone_names(ids, V) == "K AE1 T | K"
    assert phone_names([V.index("<phone>_dict_begin"), ids[0], V.index("<phone>_dict_end")], V) == "K"
    assert [V.symbol(i) for i in phone_ids(V)] == ["<phone>_K", "<phone>_AE1", "<phone>_T", "<phone>_|"]


@pytest.mark.parametrize("value", ["", "  ", 3, None, [1, 2], []])
def test_what_is_no_phones(value: Any) -> None:
    with pytest.raises(DataError, match="row 1: phones must be names"):
        encode_phones(value, V, where="row 1")


def test_masking_hides_the_asked_share() -> None:
    ids = encode_phones("K T K T K T K T K T " * 10, V)
    masked = mask_phones(ids, V, np.random.default_rng(0), 0.5)
    unknown = sum(token == UNKNOWN for token in masked)
    assert 40 <= unknown <= 50 and sum(a != b for a, b in zip(ids, masked, strict=True)) <= 50
    assert mask_phones(ids, V, np.random.default_rng(0), 0.5) == masked
    assert mask_phones([], V, np.random.default_rng(0), 0.5) == []

"""Noise and masks on text."""

from __future__ import annotations

import numpy as np
import pytest

from ofakern.errors import DataError
from ofakern.modality.text.preprocess import corrupt, encode_text, infill, replace_random
from ofakern.text import Tokenizer

TOKENIZER = Tokenizer.train(["one two three four"] * 3, 300)
VOCABULARY = TOKENIZER.vocabulary
IDS = [VOCABULARY.range("text").start + i % 200 for i in range(400)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_noise_replaces_the_given_share_by_text_tokens() -> None:
    noisy = replace_random(IDS, VOCABULARY, rng(), 0.3)
    changed = sum(a != b for a, b in zip(IDS, noisy, strict=True))
    assert 0.2 * len(IDS) < changed < 0.4 * len(IDS)
    assert all(i in VOCABULARY.range("text") for i in noisy)
    assert replace_random(IDS, VOCABULARY, rng(), 0.0) == IDS


@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.6])
def test_infilling_masks_about_the_given_share(ratio: float) -> None:
    shares = []
    for seed in range(30):
        out = infill(IDS, VOCABULARY, rng(seed), ratio, keep_length=True)
        assert len(out) == len(IDS)
        assert all(new in (old, VOCABULARY.mask) for old, new in zip(IDS, out, strict=True))
        shares.append(out.count(VOCABULARY.mask) / len(IDS))
    # spans may overlap, so the share masked is at most the ratio: 1 - e^-r of a random cover, at least
    assert 1 - np.exp(-ratio) - 0.03 < np.mean(shares) <= ratio + 1 / len(IDS)


def test_insertions_keep_the_tokens_and_their_order() -> None:
    lengths = []
    for seed in range(30):
        out = infill(IDS, VOCABULARY, rng(seed), 0.5)
        kept = [i for i in out if i != VOCABULARY.mask]
        rest = iter(IDS)
        assert all(i in rest for i in kept)  # a subsequence
        lengths.append(len(out) - len(IDS))
    assert min(lengths) >= 0 and max(lengths) > 0


def test_seeded_and_clean_by_default() -> None:
    assert corrupt(IDS, VOCABULARY, rng()) == IDS
    first = corrupt(IDS, VOCABULARY, rng(1), noise_ratio=0.2, mask_ratio=0.2)
    assert first == corrupt(IDS, VOCABULARY, rng(1), noise_ratio=0.2, mask_ratio=0.2)
    assert first != corrupt(IDS, VOCABULARY, rng(2), noise_ratio=0.2, mask_ratio=0.2)
    assert infill([], VOCABULARY, rng(), 0.5) == []
    assert infill(IDS[:1], VOCABULARY, rng(), 1.0, keep_length=True) == [VOCABULARY.mask]


def test_values() -> None:
    assert encode_text(3, TOKENIZER) == TOKENIZER.encode("3")
    assert encode_text("One, two!", TOKENIZER, uncased=True, no_punctuation=True) == TOKENIZER.encode("one two")
    for value in (None, ["a"], True, b"a"):
        with pytest.raises(DataError, match=f"^t: text must be a string, got {type(value).__name__}"):
            encode_text(value, TOKENIZER, where="t")

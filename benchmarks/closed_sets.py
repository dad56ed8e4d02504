"""Closed sets like those that are used: VQA's 3,129 answers, one to five tokens each, most of them one word."""

from __future__ import annotations

import numpy as np

from ofakern.text.trie import TokenSequences

VOCABULARY = 59457
TEXT = (4, 50269)  # the ids of text
_WORDS = (0.76, 0.17, 0.05, 0.02)  # how many of the answers have one, two, ... words
_PIECES = (0.8, 0.2)  # how many of the words are one token, and two


def vqa_answers(count: int = 3129, seed: int = 0) -> TokenSequences:
    """`count` distinct answers: words drawn from a few thousand, common ones often, of one or two tokens each."""
    random = np.random.default_rng(seed)
    words = _words(random, max(count, 64))
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        length = 1 + random.choice(len(_WORDS), p=_WORDS)
        ranks = np.minimum(random.zipf(1.2, length) - 1, len(words) - 1)
        if length == 1:  # one-word answers are distinct words: no rank is preferred
            ranks = random.integers(0, len(words), 1)
        tokens = tuple(token for rank in ranks for token in words[rank])
        if len(tokens) <= 5:
            found[tokens] = None
    return TokenSequences.of(found)


def _words(random: np.random.Generator, count: int) -> list[tuple[int, ...]]:
    ids = random.permutation(np.arange(*TEXT))[: 2 * count].tolist()
    pieces = 1 + random.choice(len(_PIECES), size=count, p=_PIECES)
    # Second tokens come from few endings, as in a BPE.
    return [(ids[n],) if pieces[n] == 1 else (ids[n], ids[count + n % 97]) for n in range(count)]

"""Tokens of a text slot back to text."""

from __future__ import annotations

from collections.abc import Sequence

from ofakern.text import ClosedSet, Tokenizer

__all__ = ["decode_text"]


def decode_text(ids: Sequence[int], tokenizer: Tokenizer, closed_set: ClosedSet | None = None) -> str:
    """The text of a slot's tokens; of a closed set, the answer as it was given (its case, its punctuation)."""
    answer = None if closed_set is None else closed_set.answer(ids)
    return tokenizer.decode(ids) if answer is None else answer

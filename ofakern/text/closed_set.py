"""Closed answer sets: a trie over token ids that says, along an answer, which tokens may stand at each place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ofakern.errors import DataError
from ofakern.text.tokenizer import Tokenizer

__all__ = ["ClosedSet"]


class ClosedSet:
    """The answers a slot may take.

    answers: texts (the keys of a mapping answer -> label do); blanks are refused, repeats dropped. `sequences` holds
    each answer's token ids, without an end token, in the order of `answers`: what constrained decoding needs.
    """

    def __init__(
        self,
        answers: Iterable[str],
        tokenizer: Tokenizer,
        *,
        uncased: bool = False,
        no_punctuation: bool = False,
        max_length: int | None = None,
    ) -> None:
        self.answers: tuple[str, ...] = tuple(dict.fromkeys(answers))
        if not self.answers:
            raise DataError("ClosedSet: answers must hold at least one answer, got 0")
        self._children: list[dict[int, int]] = [{}]
        self._answer_at: dict[int, str] = {}
        sequences = []
        for answer in self.answers:
            if not isinstance(answer, str) or not answer.strip():
                raise DataError(f"ClosedSet: answers must be text that is not blank, got {answer!r}")
            ids = tokenizer.encode(answer, uncased=uncased, no_punctuation=no_punctuation, max_length=max_length)
            sequences.append(tuple(ids))
            self._answer_at.setdefault(self._insert(ids), answer)
        self.sequences: tuple[tuple[int, ...], ...] = tuple(sequences)

    def __len__(self) -> int:
        return len(self.answers)

    def __repr__(self) -> str:
        return f"ClosedSet({len(self)} answers)"

    def __contains__(self, ids: Iterable[int]) -> bool:
        return self.answer(ids) is not None

    def allowed_along(self, ids: Sequence[int], end: int) -> list[Tensor]:
        """int64 per place of an answer's tokens `ids` and of the token after it: the ids allowed there, ascending.

        end: the token that follows an answer (end of sequence, as a rule); it is allowed where an answer is complete.
        Past a prefix that no answer has, only `end` is allowed.
        """
        node, rows = 0, []
        for token in [*ids, end]:
            rows.append(self._allowed(node, end))
            node = self._children[node].get(int(token), -1) if node >= 0 else -1
        return rows

    def answer(self, ids: Iterable[int]) -> str | None:
        """The answer whose tokens are `ids` (without begin and end tokens), or None."""
        node = 0
        for token in ids:
            following = self._children[node].get(int(token))
            if following is None:
                return None
            node = following
        return self._answer_at.get(node)

    def _allowed(self, node: int, end: int) -> Tensor:
        tokens = set(self._children[node]) if node >= 0 else set()
        if node in self._answer_at or not tokens:
            tokens.add(end)
        return torch.tensor(sorted(tokens), dtype=torch.int64)

    def _insert(self, ids: Sequence[int]) -> int:
        node = 0
        for token in ids:
            child = self._children[node].get(token)
            if child is None:
                child = len(self._children)
                self._children.append({})
                self._children[node][token] = child
            node = child
        return node

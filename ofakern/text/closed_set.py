"""Closed answer sets: a trie over token ids that says, along an answer, which tokens may stand at each place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ofakern.errors import DataError
from ofakern.text.tokenizer import Tokenizer
from ofakern.text.trie import TokenSequences, TokenTrie

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
        distinct = tuple(dict.fromkeys(answers))
        if not distinct:
            raise DataError("ClosedSet: answers must hold at least one answer, got 0")
        for answer in distinct:
            if not isinstance(answer, str) or not answer.strip():
                raise DataError(f"ClosedSet: answers must be text that is not blank, got {answer!r}")
        self._keep(
            distinct,
            TokenSequences.of(
                tokenizer.encode(answer, uncased=uncased, no_punctuation=no_punctuation, max_length=max_length)
                for answer in distinct
            ),
        )

    @classmethod
    def encoded(cls, answers: Iterable[str], sequences: TokenSequences) -> ClosedSet:
        """Of answers whose tokens are known: `sequences` of another set with the same answers.

        Raises DataError when there is not one sequence for each answer.
        """
        distinct = tuple(dict.fromkeys(answers))
        if len(distinct) != len(sequences) or not distinct:
            raise DataError(
                f"ClosedSet: sequences must be one for each of {len(distinct)} answers, got {len(sequences)}"
            )
        made = cls.__new__(cls)
        made._keep(distinct, sequences)
        return made

    def _keep(self, answers: tuple[str, ...], sequences: TokenSequences) -> None:
        self.answers = answers
        self.sequences = sequences
        self._trie = TokenTrie(sequences)

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
            node = self._trie.child(node, int(token)) if node >= 0 else -1
        return rows

    def answer(self, ids: Iterable[int]) -> str | None:
        """The answer whose tokens are `ids` (without begin and end tokens), or None."""
        found = self._trie.find(map(int, ids))
        return None if found < 0 else self.answers[found]

    def _allowed(self, node: int, end: int) -> Tensor:
        if node < 0:
            return torch.tensor([end])
        tokens = self._trie.children(node).astype(np.int64)
        if self._trie.sequence_at[node] >= 0:
            tokens = np.union1d(tokens, [end])
        return torch.from_numpy(tokens)

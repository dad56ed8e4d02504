"""Metrics of text answers. References may be one text or several acceptable ones per sample."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from ofakern.errors import OfakernValueError

__all__ = ["References", "accuracy", "normalise_answer", "token_f1", "token_f1_one", "vqa_score", "wer"]

References = str | Sequence[str]
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")


def normalise_answer(text: str) -> str:
    """Lower case, ASCII punctuation out, white space squeezed."""
    return " ".join(_PUNCTUATION.sub(" ", text.lower()).split())


def as_list(references: References) -> list[str]:
    """The acceptable texts of one sample."""
    return [references] if isinstance(references, str) else list(references)


def check_lengths(where: str, predictions: Sequence[object], references: Sequence[object]) -> None:
    """Raises OfakernValueError unless there is one reference per prediction and at least one of each."""
    if len(predictions) != len(references) or not predictions:
        raise OfakernValueError(
            f"{where}: references must be as many as predictions and at least one, "
            f"got {len(references)} for {len(predictions)}"
        )


def accuracy(predictions: Sequence[str], references: Sequence[References]) -> float:
    """The share of predictions that equal one of their references, both normalised; in [0, 1]."""
    check_lengths("accuracy", predictions, references)
    hits = [
        normalise_answer(prediction) in {normalise_answer(r) for r in as_list(reference)}
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return sum(hits) / len(hits)


def token_f1(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Mean F1 of words (with multiplicity, normalised) against the best reference of each sample; in [0, 1]."""
    check_lengths("token_f1", predictions, references)
    scores = [
        max((token_f1_one(prediction, r) for r in as_list(reference)), default=0.0)
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return sum(scores) / len(scores)


def token_f1_one(prediction: str, reference: str) -> float:
    """F1 of the words of one prediction against one reference; 1 when both have no words."""
    predicted, expected = normalise_answer(prediction).split(), normalise_answer(reference).split()
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected))


def vqa_score(predictions: Sequence[str], references: Sequence[Mapping[str, float] | Sequence[str]]) -> float:
    """Mean VQA score; in [0, 1].

    references: per question either answer -> confidence (OFA's files), or the annotators' answers, where an answer
    that k of them gave scores min(1, k / 3) averaged over the subsets that leave one annotator out (the VQA-v2
    evaluation).
    """
    check_lengths("vqa_score", predictions, references)
    scores = [_vqa_one(p, r) for p, r in zip(predictions, references, strict=True)]
    return sum(scores) / len(scores)


def _vqa_one(prediction: str, reference: Mapping[str, float] | Sequence[str]) -> float:
    answer = normalise_answer(prediction)
    if isinstance(reference, Mapping):
        return max((float(score) for text, score in reference.items() if normalise_answer(text) == answer), default=0.0)
    if isinstance(reference, str):
        raise OfakernValueError(
            f"vqa_score: references must be answer -> confidence or a list of answers per question, got {reference!r}"
        )
    given = [normalise_answer(text) == answer for text in reference]
    total, count = sum(given), len(given)
    if count <= 1:
        return float(total)
    return sum(min(1.0, (total - left_out) / 3) for left_out in given) / count


def wer(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Word error rate: edits that turn the predictions into their references / words of the references, normalised.

    Of several references the one with the fewest edits per word counts. Above 1 when a prediction is far too long.
    """
    check_lengths("wer", predictions, references)
    edits = words = 0
    for prediction, wanted in zip(predictions, references, strict=True):
        said = normalise_answer(prediction).split()
        choices = [normalise_answer(text).split() for text in as_list(wanted)]
        counted = [(word_edits(said, choice), len(choice)) for choice in choices]
        best = min(counted, key=lambda one: one[0] / max(1, one[1]))
        edits, words = edits + best[0], words + best[1]
    return edits / max(1, words)


def word_edits(said: Sequence[str], wanted: Sequence[str]) -> int:
    """The fewest insertions, deletions and replacements between two lists of words (Levenshtein)."""
    row = list(range(len(wanted) + 1))
    for i, word in enumerate(said, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(wanted, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (word != other))
    return row[-1]

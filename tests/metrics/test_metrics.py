"""Metrics against hand-computed values; baselines against exhaustive search."""

from __future__ import annotations

import itertools

import pytest

from ofakern.errors import OfakernValueError
from ofakern.metrics import (
    accuracy,
    best_constant_box,
    best_constant_text,
    box_iou,
    grounding_scores,
    majority_answer,
    token_f1,
    vqa_score,
    wer,
)


def test_accuracy_normalises_and_takes_any_reference() -> None:
    assert accuracy(["Yes!", "a  cat", "no"], ["yes", ["dog", "A cat."], "yes"]) == pytest.approx(2 / 3)


def test_token_f1_counts_words_with_multiplicity() -> None:
    assert token_f1(["the red ball"], ["the ball"]) == pytest.approx(2 * 2 / 5)
    assert token_f1(["the the"], ["the cat"]) == pytest.approx(2 * 1 / 4)
    assert token_f1(["x"], [["y", "x z"]]) == pytest.approx(2 / 3)
    assert token_f1(["", "", "a"], ["", "a", ""]) == pytest.approx(1 / 3)


def test_vqa_score() -> None:
    assert vqa_score(["no", "two"], [{"no": 0.6, "yes": 0.3}, {"three": 1.0}]) == pytest.approx(0.3)
    ten = ["yes"] * 3 + ["no"] * 7
    assert vqa_score(["yes"], [ten]) == pytest.approx((3 * 2 / 3 + 7 * 1.0) / 10)
    with pytest.raises(OfakernValueError, match="vqa_score: references"):
        vqa_score(["yes"], ["yes"])


def test_box_iou_and_grounding_scores() -> None:
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_iou((0, 0, 1, 1), (1, 1, 2, 2)) == 0
    assert box_iou((1, 1, 1, 3), (0, 0, 4, 4)) == 0
    scores = grounding_scores([(0, 0, 2, 2), (0, 0, 2, 4), None], [(0, 0, 2, 2), (0, 0, 2, 2), (0, 0, 1, 1)])
    assert scores == {"mean_iou": pytest.approx(0.5), "accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize("function", [accuracy, token_f1, vqa_score, grounding_scores])
def test_lengths_must_agree(function: object) -> None:
    with pytest.raises(OfakernValueError, match="must be as many as predictions"):
        function(["a"], [])  # type: ignore[operator]
    with pytest.raises(OfakernValueError):
        function([], [])  # type: ignore[operator]


def test_majority_answer() -> None:
    assert majority_answer(["no", "yes", "yes", "no", "x"]) == "no"
    with pytest.raises(OfakernValueError):
        majority_answer([])


def test_best_constant_text_beats_every_reference_and_all_short_texts() -> None:
    references = ["a red ball", "a red cat", "a blue cat", "the sky", ["a dog", "red dog"]]
    best = best_constant_text(references)
    score = token_f1([best] * 5, references)
    words = ["a", "red", "ball", "cat", "blue", "the", "sky", "dog"]
    rivals = [" ".join(t) for n in (1, 2, 3) for t in itertools.combinations(words, n)]
    assert score >= max(token_f1([r] * 5, references) for r in rivals) - 1e-12


def test_best_constant_box_is_as_good_as_a_grid() -> None:
    boxes = [(0, 0, 40, 40), (10, 10, 50, 60), (5, 8, 42, 44), (60, 60, 90, 90)]
    best = best_constant_box(boxes)
    score = grounding_scores([best] * 4, boxes)["mean_iou"]
    grid = range(0, 95, 10)
    rivals = [(a, b, c, d) for a in grid for b in grid for c in grid for d in grid if a < c and b < d]
    assert score >= max(sum(box_iou(r, b) for b in boxes) / 4 for r in rivals)
    shares = best_constant_box(boxes, sizes=[(100, 50)] * 4)
    assert all(s == pytest.approx(b / e, abs=0.02) for s, b, e in zip(shares, best, (100, 50) * 2, strict=True))


def test_word_error_rate() -> None:
    assert wer(["a red ball"], ["A red ball."]) == 0.0
    assert wer(["a red", "no"], ["a blue ball", "no"]) == pytest.approx(2 / 4)
    assert wer(["a b c d"], ["a"]) == 3.0
    assert wer([""], ["a b"]) == 1.0
    assert wer(["one two"], [["three", "one two"]]) == 0.0
    with pytest.raises(OfakernValueError, match="as many as predictions"):
        wer([], [])

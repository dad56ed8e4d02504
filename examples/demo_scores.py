"""What the demonstration measures, and the constant answers it is measured against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

__all__ = ["Box", "best_constant_box", "best_constant_caption", "box_iou", "majority_answer", "token_f1"]

Box = tuple[float, float, float, float]


def token_f1(prediction: str, truth: str) -> float:
    """F1 of the words both texts share, counted with repetition; 1 for equal bags of words, 0 when none is shared."""
    ours, theirs = Counter(prediction.lower().split()), Counter(truth.lower().split())
    shared = (ours & theirs).total()
    return 2.0 * shared / (ours.total() + theirs.total()) if shared else 0.0


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1) in the same unit; 0 when a box is empty or inverted."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (areas - width * height)


def majority_answer(answers: Sequence[str]) -> str:
    """The most frequent answer; the first one in the alphabet among equals."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def best_constant_caption(captions: Sequence[str], rounds: int = 6) -> str:
    """A caption whose mean token F1 over all `captions` is the best that greedy search finds.

    It grows one word at a time out of the 40 most frequent words and stops when no word helps, so it may be a bag of
    words that is nobody's caption: a stronger baseline than any real one.
    """

    def score(words: tuple[str, ...]) -> float:
        return sum(token_f1(" ".join(words), caption) for caption in captions) / len(captions)

    frequent = [word for word, _ in Counter(" ".join(captions).lower().split()).most_common(40)]
    best: tuple[str, ...] = max(((word,) for word in frequent), key=score)
    for _ in range(rounds):
        longer = max(((*best, word) for word in frequent), key=score)
        if score(longer) <= score(best):
            break
        best = longer
    return " ".join(best)


def best_constant_box(boxes: Sequence[Box], steps: int = 4000) -> Box:
    """The box whose mean IoU with all `boxes` is the best that seeded random search around their mean finds."""
    truth = np.asarray(boxes, dtype=np.float64)
    span = float(truth.max())

    def score(box: np.ndarray) -> float:
        low, high = np.maximum(box[:2], truth[:, :2]), np.minimum(box[2:], truth[:, 2:])
        shared = np.clip(high - low, 0.0, None).prod(1)
        areas = (truth[:, 2:] - truth[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
        return float((shared / (areas - shared)).mean())

    rng = np.random.default_rng(0)
    best = truth.mean(0)
    reached = score(best)
    for step in range(steps):
        width = span * 0.1 * 0.5 ** (step / steps * 6)
        candidate = best + rng.normal(0.0, width, 4)
        if (candidate[2:] > candidate[:2]).all() and score(candidate) > reached:
            best, reached = candidate, score(candidate)
    return (float(best[0]), float(best[1]), float(best[2]), float(best[3]))

"""Best constant answers, chosen on training data: what a model that does not look has to be better than."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ofakern.errors import OfakernValueError
from ofakern.metrics.boxes import Box
from ofakern.metrics.texts import References, as_list, normalise_answer

Array = np.ndarray[Any, Any]

__all__ = ["best_constant_box", "best_constant_text", "majority_answer"]


def majority_answer(answers: Sequence[str]) -> str:
    """The most frequent answer; the first one of those that are equally frequent. Raises OfakernValueError for none."""
    if not answers:
        raise OfakernValueError("majority_answer: answers must hold at least one answer, got 0")
    return Counter(answers).most_common(1)[0][0]


def best_constant_text(references: Sequence[References], max_words: int = 30) -> str:
    """A text of great mean token F1 against all samples (the best reference of each counts).

    Whichever scores more: the best of the 50 most frequent references, or the text that grows by the word that helps
    most until none does. Raises OfakernValueError for no sample.
    """
    if not references:
        raise OfakernValueError("best_constant_text: references must hold at least one sample, got 0")
    texts = [[normalise_answer(text) for text in as_list(sample)] or [""] for sample in references]
    flat = [text for sample in texts for text in sample]
    starts = np.cumsum([0, *(len(sample) for sample in texts)])[:-1]
    bags = [Counter(text.split()) for text in flat]
    sizes = np.array([sum(bag.values()) for bag in bags], dtype=np.float64)

    def mean_f1(text: str) -> float:
        bag = Counter(text.split())
        overlap = np.array([sum((bag & other).values()) for other in bags], dtype=np.float64)
        return float(_best_per_sample(overlap, sizes, sum(bag.values()), starts).mean())

    candidates = [_grow(bags, sizes, starts, max_words), *(text for text, _ in Counter(flat).most_common(50))]
    return max(candidates, key=mean_f1)


def best_constant_box(boxes: Sequence[Box], sizes: Sequence[tuple[int, int]] | None = None) -> Box:
    """The box of greatest mean IoU with `boxes`, found by coordinate search from their median, mean and extent.

    sizes: (width, height) of each image; then boxes are taken, and the answer is given, as shares of the image's
    extent in [0, 1]. Raises OfakernValueError for no box.
    """
    if not boxes:
        raise OfakernValueError("best_constant_box: boxes must hold at least one box, got 0")
    array = np.asarray(boxes, dtype=np.float64).reshape(len(boxes), 4)
    if sizes is not None:
        array = array / np.asarray([(*size, *size) for size in sizes], dtype=np.float64)
    extent = np.concatenate([array[:, :2].min(0), array[:, 2:].max(0)])
    starts = [np.median(array, 0), array.mean(0), extent]
    step = np.tile(extent[2:] - extent[:2], 2) / 16
    best = max((_refine(start, array, step) for start in starts), key=lambda box: _mean_iou(box, array))
    return tuple(best.tolist())


def _refine(box: Array, boxes: Array, step: Array) -> Array:
    score = _mean_iou(box, boxes)
    for _ in range(8):  # the step halves each time: the end is exact to 1/2048 of the extent
        moved = True
        while moved:
            moved = False
            for change in np.concatenate([np.diag(step), -np.diag(step)]):
                trial = _mean_iou(box + change, boxes)
                if trial > score + 1e-12:
                    box, score, moved = box + change, trial, True
        step = step / 2
    return box


def _mean_iou(box: Array, boxes: Array) -> float:
    common = (np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])).clip(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(1) + (box[2:] - box[:2]).clip(min=0).prod()
    return float((common / np.maximum(areas - common, 1e-12)).mean())


def _grow(bags: Sequence[Counter[str]], sizes: Array, starts: Array, max_words: int) -> str:
    frequent = Counter(word for bag in bags for word in bag)
    words = [word for word, _ in frequent.most_common(50)]
    counts = np.array([[bag[word] for word in words] for bag in bags], dtype=np.float64).reshape(len(bags), -1)
    chosen, overlap, score = np.zeros(len(words)), np.zeros(len(bags)), 0.0
    text: list[str] = []
    while words and len(text) < max_words:
        trials = overlap[:, None] + (counts > chosen)
        means = _best_per_sample(trials, sizes[:, None], len(text) + 1, starts).mean(0)
        best = int(means.argmax())
        if means[best] <= score:
            break
        text.append(words[best])
        overlap, score = trials[:, best], float(means[best])
        chosen[best] += 1
    return " ".join(text)


def _best_per_sample(overlap: Array, sizes: Array, length: int, starts: Array) -> Array:
    """F1 per reference, then the best of each sample's references. starts: each sample's first reference."""
    f1 = 2 * overlap / np.maximum(sizes + length, 1)
    return np.asarray(np.maximum.reduceat(f1, starts, axis=0))

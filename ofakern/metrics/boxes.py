"""Metrics of boxes x0, y0, x1, y1."""

from __future__ import annotations

from collections.abc import Sequence

from ofakern.errors import OfakernValueError
from ofakern.metrics.texts import check_lengths

__all__ = ["Box", "box_iou", "grounding_scores"]

Box = Sequence[float]


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 when either has no area."""
    for box in (a, b):
        if len(box) != 4:
            raise OfakernValueError(f"box_iou: box must be four numbers x0, y0, x1, y1, got {list(box)}")
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    union = _area(a) + _area(b) - common
    return common / union if union > 0 else 0.0


def grounding_scores(
    predictions: Sequence[Box | None], references: Sequence[Box], threshold: float = 0.5
) -> dict[str, float]:
    """Mean IoU (`mean_iou`) and the share of predictions at or above `threshold` (`accuracy`); None counts as IoU 0."""
    check_lengths("grounding_scores", predictions, references)
    ious = [0.0 if p is None else box_iou(p, r) for p, r in zip(predictions, references, strict=True)]
    return {"mean_iou": sum(ious) / len(ious), "accuracy": sum(iou >= threshold for iou in ious) / len(ious)}


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)

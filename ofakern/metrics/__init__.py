"""Metrics of answers against references, and the best constant answers they are measured against."""

from ofakern.metrics.baselines import best_constant_box, best_constant_text, majority_answer
from ofakern.metrics.boxes import box_iou, grounding_scores
from ofakern.metrics.texts import accuracy, normalise_answer, token_f1, vqa_score, wer

__all__ = [
    "accuracy",
    "best_constant_box",
    "best_constant_text",
    "box_iou",
    "grounding_scores",
    "majority_answer",
    "normalise_answer",
    "token_f1",
    "vqa_score",
    "wer",
]

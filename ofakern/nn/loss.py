"""Label-smoothed cross entropy over packed tokens, as training and evaluation use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ofakern.ops.cross_entropy import IGNORED, AllowedIds, cross_entropy

__all__ = ["IGNORE_LABEL", "AllowedIds", "LossSums", "label_smoothed_cross_entropy"]

IGNORE_LABEL = IGNORED


@dataclass(frozen=True)
class LossSums:
    """Sums over the labelled tokens. loss: smoothed, differentiable; nll: plain, detached; tokens: int64 `[]`.

    parts: detached sums by name, of a loss that has several.
    """

    loss: Tensor
    nll: Tensor
    tokens: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


def label_smoothed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    epsilon: float = 0.0,
    allowed: AllowedIds | None = None,
    drop_worst: float = 0.0,
) -> LossSums:
    """The loss of `hidden @ weight^T`, summed over the tokens with a label: `ofakern.ops.cross_entropy`, as a sum.

    hidden `[N, D]`, weight `[V, D]`, labels int64 `[N]` (-100: no loss); allowed: the ids that each token may have (all
    V without); drop_worst: the part of the tokens, those of the largest loss, that is left out of all sums. Raises
    OfakernValueError and OfakernTypeError as `cross_entropy` does.
    """
    sums = cross_entropy(hidden, weight, labels, epsilon=epsilon, allowed=allowed, drop_worst=drop_worst)
    return LossSums(sums.loss, sums.nll, sums.tokens)

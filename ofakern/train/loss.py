"""Label-smoothed cross entropy over packed target tokens, as sums: batches, tasks and ranks add up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ofakern.data.batch import IGNORE_LABEL, Allowed
from ofakern.errors import OfakernValueError


@dataclass(frozen=True)
class LossSums:
    """Sums over the tokens that have a loss.

    Attributes:
        loss: f32 scalar with a gradient, the smoothed loss.
        nll: f32 scalar without one, the negative log-likelihood.
        tokens: how many tokens were summed.
    """

    loss: Tensor
    nll: Tensor
    tokens: int


def label_smoothed_cross_entropy(logits: Tensor, labels: Tensor, epsilon: float, allowed: Tensor | None) -> LossSums:
    """OFA's criterion: (1 - eps - eps_i) nll + eps_i sum(-log p), eps_i = eps / (V - 1), summed over the rows.

    Args:
        logits: [n, V], any float dtype; the loss is taken in f32.
        labels: int64 [n].
        epsilon: eps, in [0, 1).
        allowed: bool [n, V]; where given, a row's probabilities, its smoothing and its V are those of what is allowed.
    """
    if not 0 <= epsilon < 1:
        raise OfakernValueError(f"loss: label_smoothing must be in [0, 1), got {epsilon}")
    logits = logits.float()
    if allowed is None:
        lprobs = torch.log_softmax(logits, -1)
        smooth = -lprobs.sum(-1)
        others = torch.full_like(smooth, max(1, logits.shape[-1] - 1))
    else:
        lprobs = torch.log_softmax(logits.masked_fill(~allowed, float("-inf")), -1)
        smooth = -lprobs.masked_fill(~allowed, 0.0).sum(-1)
        others = allowed.sum(-1) - 1.0
    nll = -lprobs.gather(-1, labels[:, None])[:, 0]
    # A row with a single allowed token has nothing to smooth over.
    eps_i = torch.where(others > 0, epsilon / others.clamp(min=1.0), 0.0)
    loss = ((1.0 - epsilon - eps_i) * nll + eps_i * smooth).sum()
    return LossSums(loss, nll.detach().sum(), labels.shape[0])


def rows_with_loss(labels: Tensor) -> Tensor:
    """int64 [n]: the packed target rows whose label counts."""
    return (labels != IGNORE_LABEL).nonzero()[:, 0]


def allowed_mask(allowed: Allowed, rows: Tensor, vocabulary_size: int) -> Tensor:
    """bool [n, V] of the label rows `rows`; a row that lists no id allows all."""
    counts = (allowed.offsets[1:] - allowed.offsets[:-1])[rows]
    mask = (counts == 0)[:, None].repeat(1, vocabulary_size)
    row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
    within = torch.arange(len(row), device=rows.device) - (counts.cumsum(0) - counts)[row]
    mask[row, allowed.ids[allowed.offsets[:-1][rows][row] + within]] = True
    return mask

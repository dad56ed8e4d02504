"""Label-smoothed cross entropy over packed tokens, without a second copy of big-vocabulary logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ofakern.errors import OfakernValueError

IGNORE_LABEL = -100


class AllowedIds(Protocol):
    """CSR of allowed ids per row: offsets int64 `[N + 1]`, ids int64 `[nnz]`; an empty row allows everything."""

    @property
    def offsets(self) -> Tensor: ...
    @property
    def ids(self) -> Tensor: ...


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
    chunk: int = 1024,
    drop_worst: float = 0.0,
) -> LossSums:
    """The loss of `hidden @ weight^T`, summed over the tokens with a label.

    hidden `[N, D]`, weight `[V, D]`, labels int64 `[N]` (-100: no loss). A: the allowed ids of a row (V without
    `allowed`). As OFA and OFASys have it, with e = epsilon / (A - 1), 0 where A = 1:

        loss = (1 - epsilon - e) * nll + e * sum over allowed ids of -log p

    drop_worst: this part of the tokens, those of the largest loss, is left out of all sums (int(n * (1 - drop_worst))
    are kept). Computed in float32, `chunk` tokens at a time. With more than one chunk each one's logits are recomputed
    in the backward pass, so at most `chunk * V` of them exist. Raises OfakernValueError for shapes that do not agree.
    """
    where = "label_smoothed_cross_entropy"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise OfakernValueError(
            f"{where}: hidden and weight must be [N, D] and [V, D], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1]:
        raise OfakernValueError(f"{where}: labels must be [N={hidden.shape[0]}], got {list(labels.shape)}")
    if allowed is not None and allowed.offsets.shape[0] != hidden.shape[0] + 1:
        raise OfakernValueError(
            f"{where}: allowed must have {hidden.shape[0] + 1} offsets, got {allowed.offsets.shape[0]}"
        )
    if not 0.0 <= drop_worst < 1.0:
        raise OfakernValueError(f"{where}: drop_worst must be in [0, 1), got {drop_worst}")
    losses, nlls = [hidden.new_zeros(0, dtype=torch.float32)], [hidden.new_zeros(0, dtype=torch.float32)]
    recompute = hidden.shape[0] > chunk and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    for begin in range(0, hidden.shape[0], chunk):
        rows = slice(begin, min(begin + chunk, hidden.shape[0]))
        mask = None if allowed is None else _disallowed(allowed, rows, weight.shape[0])
        if recompute:
            loss, nll = checkpoint(_chunk, hidden[rows], weight, labels[rows], epsilon, mask, use_reentrant=False)
        else:
            loss, nll = _chunk(hidden[rows], weight, labels[rows], epsilon, mask)
        losses.append(loss)
        nlls.append(nll)
    loss, nll, labelled = torch.cat(losses), torch.cat(nlls).detach(), labels != IGNORE_LABEL
    if drop_worst:
        kept = int(int(labelled.sum()) * (1.0 - drop_worst))
        chosen = loss.detach().masked_fill(~labelled, torch.inf).topk(kept, largest=False).indices
        return LossSums(loss[chosen].sum(), nll[chosen].sum(), torch.tensor(kept, device=labels.device))
    return LossSums(loss.sum(), nll.sum(), labelled.sum())


def _chunk(
    hidden: Tensor, weight: Tensor, labels: Tensor, epsilon: float, disallowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss and negative log-likelihood of each token."""
    logits = F.linear(hidden, weight).float()
    count = torch.full_like(labels, weight.shape[0])
    if disallowed is not None:
        logits = logits.masked_fill(disallowed, -torch.inf)
        count = count - disallowed.sum(1)
    total = torch.logsumexp(logits, 1)
    labelled = labels != IGNORE_LABEL
    picked = logits.gather(1, labels.where(labelled, 0)[:, None])[:, 0]
    nll = torch.where(labelled, total - picked, 0.0)
    if epsilon == 0.0:
        return nll, nll
    if disallowed is not None:
        logits = logits.masked_fill(disallowed, 0.0)
    smooth = torch.where(labelled, total * count - logits.sum(1), 0.0)
    each = torch.where(count > 1, epsilon / (count - 1).clamp(min=1), 0.0)
    return (1.0 - epsilon - each) * nll + each * smooth, nll


def _disallowed(allowed: AllowedIds, rows: slice, vocabulary: int) -> Tensor:
    """bool `[rows, V]`: ids that may not be chosen."""
    offsets = allowed.offsets[rows.start : rows.stop + 1]
    counts = offsets.diff()
    mask = (counts > 0)[:, None].expand(-1, vocabulary).clone()
    row = torch.repeat_interleave(torch.arange(counts.shape[0], device=counts.device), counts)
    mask[row, allowed.ids[offsets[0] : offsets[-1]]] = False
    return mask

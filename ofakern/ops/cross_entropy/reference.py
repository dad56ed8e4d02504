"""Label-smoothed cross entropy of `hidden @ weight^T` in plain torch: the oracle, and the backend without kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100


def cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    epsilon: float = 0.0,
    offsets: Tensor | None = None,
    ids: Tensor | None = None,
    allowed_range: Tensor | None = None,
    always_allowed: int = 0,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token loss, nll (float32, float64 for float64 inputs; `[N]`) and the best allowed id (int64; -100 without a
    label).

    hidden `[N, D]`, weight `[V, D]`, bias `[V]`, labels int64 `[N]` (-100: no loss). A: how many ids a token
    allows: all V; its row of the CSR table (offsets `[N + 1]`, ids `[nnz]`; an empty row allows all); or the ids below
    always_allowed and [lo, hi) of allowed_range `[N, 2]` or `[1, 2]`. With e = epsilon / (A - 1), 0 where A = 1:

        loss = (1 - epsilon - e) * nll + e * sum over allowed ids of -log p

    With more than one chunk of tokens each one's logits are computed again in the backward pass.
    """
    results: list[list[Tensor]] = [[], [], []]
    again = hidden.shape[0] > chunk and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    for begin in range(0, hidden.shape[0], chunk):
        rows = slice(begin, min(begin + chunk, hidden.shape[0]))
        mask = _disallowed(rows, weight.shape[0], offsets, ids, allowed_range, always_allowed)
        arguments = (hidden[rows], weight, bias, labels[rows], epsilon, mask)
        parts = _again(*arguments) if again else _chunk(*arguments)
        for total, part in zip(results, parts, strict=True):
            total.append(part)
    if not results[0]:
        nothing = (hidden.sum() + weight.sum() * 0).float() * labels.float()
        return nothing, nothing, labels.clone()
    return torch.cat(results[0]), torch.cat(results[1]), torch.cat(results[2])


def _again(*arguments: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    """`_chunk`, which draws nothing, computed again in the backward pass."""
    parts: tuple[Tensor, Tensor, Tensor]
    parts = checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
    return parts


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, epsilon: float, disallowed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    count = torch.full_like(labels, weight.shape[0])
    if disallowed is not None:
        logits = logits.masked_fill(disallowed, -torch.inf)
        count = count - disallowed.sum(1)
    labelled = labels != IGNORED
    best = logits.argmax(1).where(labelled, IGNORED)
    total = torch.logsumexp(logits, 1)
    picked = logits.gather(1, labels.where(labelled, 0)[:, None])[:, 0]
    nll = torch.where(labelled, total - picked, 0.0)
    if epsilon == 0.0:
        return nll, nll, best
    if disallowed is not None:
        logits = logits.masked_fill(disallowed, 0.0)
    smooth = torch.where(labelled, total * count - logits.sum(1), 0.0)
    each = torch.where(count > 1, epsilon / (count - 1).clamp(min=1), 0.0).to(logits.dtype)
    return (1.0 - epsilon - each) * nll + each * smooth, nll, best


def _disallowed(
    rows: slice,
    vocabulary: int,
    offsets: Tensor | None,
    ids: Tensor | None,
    allowed_range: Tensor | None,
    always_allowed: int,
) -> Tensor | None:
    """bool `[rows, V]`: ids that may not be chosen."""
    if allowed_range is not None:
        lo, hi = allowed_range.expand(rows.stop, 2)[rows].unbind(1)
        every = torch.arange(vocabulary, device=allowed_range.device)
        return (every >= always_allowed) & ((every < lo[:, None]) | (every >= hi[:, None]))
    if offsets is None or ids is None:
        return None
    count = rows.stop - rows.start
    some = offsets.diff()[rows] > 0
    mask = torch.cat([some, some[:1]])[:, None].expand(-1, vocabulary).clone()
    every = torch.arange(ids.shape[0], device=ids.device)
    row = torch.searchsorted(offsets, every, right=True) - 1 - rows.start
    row = row.where((row >= 0) & (row < count), count)  # ids of other rows: in one row too many
    # Not mask[row, ids] = False, which brings the False from the host.
    return mask.index_put_((row, ids), mask.new_zeros(()))[:count]

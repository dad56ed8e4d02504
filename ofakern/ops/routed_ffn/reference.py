"""A routed feed-forward layer in plain torch, expert by expert: the oracle, and the backend without kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def routed_linear_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    counts: Sequence[int],
    source: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """`[N, K]` to `[N, O]`: the place p of expert e gives y[target[p]] = x[source[p]] @ weights[e]^T + biases[e].

    weights: E of `[O, K]`; biases: E of `[O]`, or none; counts: tokens of each expert, whose places stand end to end;
    source, target: permutations int64 `[N]`, identity where None.
    """
    rows = x if source is None else x.index_select(0, source)
    parts = [
        F.linear(part, weight, biases[e] if biases else None)
        for e, (part, weight) in enumerate(zip(torch.split(rows, list(counts)), weights, strict=True))
    ]
    y = torch.cat(parts) if len(parts) > 1 else parts[0]
    return y if target is None else torch.zeros_like(y).index_copy(0, target, y)

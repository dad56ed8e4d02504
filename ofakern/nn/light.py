"""Light tuning: bottleneck adapters inside layers, and prefixes that every token may attend to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.nn.linear import Linear

# The published dropout of prefixes in training.
PREFIX_DROPOUT = 0.2


class Bottleneck(nn.Module):
    """x + up(relu(down(x))), `[N, D]` to `[N, D]`."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down_proj = Linear(dim, width)
        self.up_proj = Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.up_proj(F.relu(self.down_proj(x)))
        return y


class PromptEncoder(nn.Module):
    """`length` learned keys and values for each layer's self-attention.

    projection: width of the network that makes them out of `[length, D]`; 0: they are stored themselves.
    """

    def __init__(self, length: int, layers: int, dim: int, heads: int, projection: int = 0) -> None:
        super().__init__()
        self.layers, self.heads = layers, heads
        whole = layers * 2 * dim
        self.embedding = nn.Embedding(length, dim if projection else whole)
        self.trans = (
            nn.Sequential(nn.Linear(dim, projection), nn.ReLU(), nn.Linear(projection, whole)) if projection else None
        )

    @property
    def length(self) -> int:
        return self.embedding.num_embeddings

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer k and v `[P, H, K]`."""
        rows = self.embedding.weight if self.trans is None else self.trans(self.embedding.weight)
        parts = F.dropout(rows, PREFIX_DROPOUT, self.training).view(self.length, self.layers, 2, self.heads, -1)
        return [(parts[:, layer, 0], parts[:, layer, 1]) for layer in range(self.layers)]


def merge(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> Tensor:
    """Attention over the union of two disjoint sets of keys, from each one's output `[N, H, V]` and log-sum-exp
    `[N, H]`. A row with no key in either set is not allowed."""
    total = torch.logaddexp(first_lse, second_lse)
    weights = [torch.exp(lse - total)[..., None] for lse in (first_lse, second_lse)]
    return (weights[0] * first + weights[1] * second).to(first.dtype)

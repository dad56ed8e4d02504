"""Feed-forward experts, one per modality: which packed token goes to which, and the linear maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ofakern.ops.routed_ffn import routed_linear


@dataclass(frozen=True)
class Routing:
    """Tokens grouped by expert, prepared once per batch.

    order: int64 `[N]`, packed rows sorted by expert (None when one expert takes all).
    runs: (expert, its number of tokens), in that order.
    """

    order: Tensor | None
    runs: tuple[tuple[int, int], ...]

    @classmethod
    def build(cls, expert: Tensor) -> Routing:
        """expert: integers `[N]` on the CPU."""
        found, counts = torch.unique(expert, return_counts=True)
        runs = tuple(zip(found.tolist(), counts.tolist(), strict=True))
        return cls(torch.argsort(expert, stable=True) if len(runs) > 1 else None, runs)

    def to(self, device: torch.device | str) -> Routing:
        return self if self.order is None else replace(self, order=self.order.to(device))

    def enter(self, x: Tensor, experts: nn.ModuleList) -> Tensor:
        """Packed tokens `[N, D]`, each through its own expert: `[N, D']`, grouped by expert."""
        return routed_linear(x, *self._parameters(experts), source=self.order)

    def leave(self, x: Tensor, experts: nn.ModuleList) -> Tensor:
        """Grouped tokens `[N, D']`, each through its own expert: `[N, D]` in packed order."""
        return routed_linear(x, *self._parameters(experts), target=self.order)

    def _parameters(self, experts: nn.ModuleList) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[int]]:
        """Weights, biases and counts of the experts that have tokens (the first one where there are no tokens)."""
        runs = self.runs or ((0, 0),)
        weights = [experts.get_parameter(f"{expert}.weight") for expert, _ in runs]
        biases = [experts.get_parameter(f"{expert}.bias") for expert, _ in runs]
        return weights, biases, [count for _, count in runs]

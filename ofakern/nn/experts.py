"""Feed-forward experts, one per modality: which packed token goes to which, and the linear maps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """Tokens grouped by expert, prepared once per batch.

    order: int64 `[N]`, packed rows sorted by expert; inverse undoes it (both None when one expert takes all).
    runs: (expert, its number of tokens), in that order.
    """

    order: Tensor | None
    inverse: Tensor | None
    runs: tuple[tuple[int, int], ...]

    @classmethod
    def build(cls, expert: Tensor) -> Routing:
        """expert: integers `[N]` on the CPU."""
        found, counts = torch.unique(expert, return_counts=True)
        runs = tuple(zip(found.tolist(), counts.tolist(), strict=True))
        if len(runs) < 2:
            return cls(None, None, runs)
        order = torch.argsort(expert, stable=True)
        return cls(order, torch.argsort(order), runs)

    def to(self, device: torch.device | str) -> Routing:
        if self.order is None or self.inverse is None:
            return self
        return replace(self, order=self.order.to(device), inverse=self.inverse.to(device))

    def sort(self, x: Tensor) -> Tensor:
        """`[N, D]` in packed order to `[N, D]` by expert."""
        return x if self.order is None else x.index_select(0, self.order)

    def unsort(self, x: Tensor) -> Tensor:
        return x if self.inverse is None else x.index_select(0, self.inverse)

    def linear(self, x: Tensor, experts: nn.ModuleList) -> Tensor:
        """Sorted tokens `[N, D]`, each through its own expert: `[N, D']`."""
        parts = torch.split(x, [count for _, count in self.runs])
        outs = [experts[expert](part) for (expert, _), part in zip(self.runs, parts, strict=True)]
        if not outs:
            empty: Tensor = experts[0](x)
            return empty
        return outs[0] if len(outs) == 1 else torch.cat(outs)

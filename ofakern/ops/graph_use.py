"""What a search says of the CUDA graphs that its steps ran as."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class GraphUse:
    """Steps that ran as CUDA graphs, and what kept others from it.

    recorded, replayed: graphs, and steps by them. without: steps that went without a graph, by the reason.
    chosen_after: steps whose graph ended before the choice of the next tokens, by the reason (a search's only).
    """

    recorded: int = 0
    replayed: int = 0
    without: Counter[str] = field(default_factory=Counter)
    chosen_after: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: GraphUse) -> GraphUse:
        return GraphUse(
            self.recorded + other.recorded,
            self.replayed + other.replayed,
            self.without + other.without,
            self.chosen_after + other.chosen_after,
        )

    def __str__(self) -> str:
        lines = [f"{self.replayed} steps by {self.recorded} newly recorded graphs"]
        lines += [f"{count} steps without a graph: {reason}" for reason, count in self.without.items()]
        lines += [f"{count} steps choose after their graph: {reason}" for reason, count in self.chosen_after.items()]
        return "\n".join(lines)

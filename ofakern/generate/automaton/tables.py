"""The tensors of an automaton that a search's step takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AutomatonTables:
    """See `Arrays`."""

    first: Tensor
    tokens: Tensor
    targets: Tensor
    range_first: Tensor
    ranges: Tensor
    renormalise: Tensor
    free: Tensor

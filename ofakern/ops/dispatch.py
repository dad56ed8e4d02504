"""What `auto` runs on a GPU: kernels that a kept result shows right and faster there, and nothing else.

`python -m benchmarks.dispatch` derives the table from benchmarks/results/h200-*.json; a test holds it to them. Nothing
is tuned at run time, and a call that no rule covers is the reference's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Capability = tuple[int, int]


class Rule(NamedTuple):
    """Calls that a backend runs, by the tensor that an op's choice looks at (its first input, in most ops)."""

    backend: str  # "cuda" or "triton"
    capability: Capability  # of the GPU
    dtype: torch.dtype
    widths: tuple[int, int]  # its last dimension, from and up to
    lengths: tuple[int, int]  # the product of its others
    result: str  # the file under benchmarks/results that shows it

    def covers(self, tensor: Tensor, capability: Capability) -> bool:
        width = tensor.shape[-1] if tensor.ndim else 1
        length = tensor.numel() // max(width, 1)
        return (
            capability == self.capability
            and tensor.dtype == self.dtype
            and self.widths[0] <= width <= self.widths[1]
            and self.lengths[0] <= length <= self.lengths[1]
        )


# By op, the first rule that covers a call. Empty: no kernel of ours has run on a GPU yet.
TABLE: dict[str, tuple[Rule, ...]] = {}


def choice(op: str, tensor: Tensor) -> str | None:
    """The backend that the table names for this call on a GPU, or None."""
    rules = TABLE.get(op)
    if not rules:
        return None
    capability = torch.cuda.get_device_capability(tensor.device)
    return next((rule.backend for rule in rules if rule.covers(tensor, capability)), None)

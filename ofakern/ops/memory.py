"""Memory for caches and packed weights: large, read at every step, and slow to read where each 4 KiB is looked up."""

from __future__ import annotations

import torch
from torch import Tensor

from ofakern.ops import native

_WORTHWHILE = 2 << 20  # a large page


def large_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """torch.empty; on Linux's CPUs in memory that begins at a large page and is asked to consist of them.

    An allocator's memory has often been touched before, and then keeps its small pages. Fresh pages are written with
    zeros first, so that this memory waits a second for the next caller before it goes back to the system.
    """
    bytes_needed = dtype.itemsize
    for size in shape:
        bytes_needed *= size
    if native.cpu is not None and torch.device(device).type == "cpu" and bytes_needed >= _WORTHWHILE:
        whole: Tensor | None = native.cpu.kept_bytes(bytes_needed)
        if whole is not None:
            return whole.view(dtype).view(shape)
    return torch.empty(shape, dtype=dtype, device=device)

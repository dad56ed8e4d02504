"""Memory for caches and packed weights: large, read at every step, and slow to read where each 4 KiB is looked up."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_PAGE = 2 << 20  # a large page
_WORTHWHILE = _PAGE


def large_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """torch.empty; on Linux's CPUs in fresh memory that begins at a large page and is asked to consist of them.

    An allocator's memory has often been touched before, and then keeps its small pages.
    """
    bytes_needed = dtype.itemsize
    for size in shape:
        bytes_needed *= size
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or torch.device(device).type != "cpu" or bytes_needed < _WORTHWHILE:
        return torch.empty(shape, dtype=dtype, device=device)
    room = mmap.mmap(-1, bytes_needed + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(room, dtype=torch.uint8)
    skipped = -whole.data_ptr() % _PAGE
    with suppress(OSError):  # only advice: a kernel without large pages refuses it and nothing is lost
        room.madvise(advice, 0, bytes_needed + _PAGE)
    return whole[skipped : skipped + bytes_needed].view(dtype).view(shape)

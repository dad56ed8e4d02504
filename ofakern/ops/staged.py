"""A step's inputs in one block of memory: laid out on the host, sent in one copy, read where they are by a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNED = 16  # words: every entry begins at a multiple of 64 bytes
_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}


@dataclass(frozen=True)
class Entry:
    """values: int32 or float32, the first ones of each dimension of `shape`; the rest of it is `fill`."""

    values: np.ndarray
    shape: tuple[int, ...]
    fill: float = 0


class Staged:
    """`tensors`: by name int32 or float32 tensors of the entries' shapes on `device`, the same ones after every `send`.

    like: entries as `send` will get them; their values do not matter.
    """

    def __init__(self, like: Mapping[str, Entry], device: torch.device) -> None:
        places: dict[str, slice] = {}
        words = 0
        for name, entry in like.items():
            size = int(np.prod(entry.shape))
            places[name] = slice(words, words + size)
            words += -(-size // _ALIGNED) * _ALIGNED
        self._host = np.zeros(words, np.int32)
        self._device = torch.zeros(words, dtype=torch.int32, device=device)
        self._parts: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, entry in like.items():
            own, dtype = places[name], entry.values.dtype
            self._parts[name] = self._host[own].view(dtype).reshape(entry.shape)
            self.tensors[name] = self._device[own].view(_DTYPES[dtype]).view(entry.shape)

    def send(self, entries: Mapping[str, Entry]) -> None:
        """Does not wait for the device. Entries have the names, shapes and dtypes of those that came first."""
        for name, entry in entries.items():
            part, values = self._parts[name], entry.values
            if values.shape != entry.shape:
                part[...] = entry.fill
            part[tuple(map(slice, values.shape))] = values
        words = torch.from_numpy(self._host)
        if self._device.is_cuda:  # a copy for each call, since that of the one before may still be on its way
            words = words.pin_memory()
        self._device.copy_(words, non_blocking=True)

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
        self._device = device
        self._places: dict[str, tuple[int, int]] = {}
        words = 0
        for name, entry in like.items():
            size = int(np.prod(entry.shape))
            self._places[name] = (words, words + size)
            words += -(-size // _ALIGNED) * _ALIGNED
        self._block = torch.zeros(words, dtype=torch.int32, device=device)
        self.tensors: dict[str, Tensor] = {
            name: self._block[slice(*self._places[name])].view(_DTYPES[entry.values.dtype]).view(entry.shape)
            for name, entry in like.items()
        }

    def send(self, entries: Mapping[str, Entry]) -> None:
        """Does not wait for the device. Entries have the names, shapes and dtypes of those that came first."""
        # A block of its own for each call: the copy of the one before may still be on its way.
        words = torch.zeros(len(self._block), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        host = words.numpy()
        for name, entry in entries.items():
            self._part(host, name, entry)
        self._block.copy_(words, non_blocking=True)

    def _part(self, host: np.ndarray, name: str, entry: Entry) -> None:
        part: Any = host[slice(*self._places[name])].view(entry.values.dtype).reshape(entry.shape)
        if entry.values.shape != entry.shape:
            part[...] = entry.fill
        part[tuple(slice(size) for size in entry.values.shape)] = entry.values

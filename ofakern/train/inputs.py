"""A batch as the input of a recorded step: its tensors, and all that a recording would freeze."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from ofakern.data.batch import PackedBatch
from ofakern.errors import OfakernRuntimeError

# What no kernel is launched with: values for metrics and, as `owned` makes sure of, tokens by sample.
_FREE = {"columns", "lengths_cpu"}


class LengthsRead(OfakernRuntimeError):
    """A step that is recorded asked how long a sample is, which may be different at the next replay."""


class _Lengths(tuple[int, ...]):
    """Lengths that can be counted, compared and handed on, but not read."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise LengthsRead("train: a recorded loss must not read how long single samples are, got a read of it")

    __iter__ = __getitem__ = __contains__ = _refuse


def tensors_of(item: object) -> list[Tensor]:
    """The tensors of nested dataclasses, dicts, lists and tuples, in a fixed order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map(item, note)
    return found


def signature(item: object) -> Hashable:
    """Equal for batches whose kernels are launched alike: shapes, dtypes, and what else there is beside tensors."""
    if isinstance(item, Tensor):
        return tuple(item.shape), item.dtype
    if is_dataclass(item):
        return type(item), *(signature(getattr(item, name)) for name in _names(item))
    if isinstance(item, dict):  # what a model prepared, in its order; the keys may tell lengths
        return tuple(map(signature, item.values()))
    if isinstance(item, (list, tuple)):
        return tuple(map(signature, item))
    return item


def owned(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """A copy on `device` that shares no tensor; reading how long its samples are raises LengthsRead."""
    copy: PackedBatch = _map(batch, lambda tensor: tensor.to(device, copy=True))
    for side in (copy.source, copy.target):
        side.lengths_cpu = _Lengths(side.lengths_cpu)
    return copy


def _map(item: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(item, Tensor):
        return convert(item)
    if is_dataclass(item) and not isinstance(item, type):
        return replace(item, **{name: _map(getattr(item, name), convert) for name in _names(item)})
    if isinstance(item, dict):
        return {key: _map(value, convert) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return type(item)(_map(value, convert) for value in item)
    return item


def _names(item: Any) -> list[str]:
    return [field.name for field in fields(item) if field.name not in _FREE]

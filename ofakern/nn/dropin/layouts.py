"""`AttentionLayout`s of padded batches, built once per batch and mask and shared by all layers that ask for the same.

Without torch.compile a layout is found again by the sizes and by the *identity* of the mask tensors (and their version:
a mask written to in place is read anew). Inside a compiled graph, and for inference tensors, which count no versions,
a registered op compares contents instead: compilers reuse buffers without telling.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ofakern.nn.dropin.masks import Kind, Mask, runs
from ofakern.ops.attention import AttentionLayout, RelativeTerm
from ofakern.ops.library import LIBRARY, refuse_vmap

_ENTRIES = 64
_CONTENT_ENTRIES = 8


class Term(Protocol):
    """Coordinates of a padded batch; hashable, because layouts are cached by it."""

    def __hash__(self) -> int: ...

    def rows(self, batch: int, queries: int, keys: int) -> int:
        """Rows of the table that the coordinates read."""

    def coordinates(self, batch: int, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """q_coord int32 `[B*T]`, k_coord int32 `[B*S]`."""


@dataclass(frozen=True)
class Shift:
    """Table row `i - j + S - 1`: query minus key position. One row more than differences, so that `[.., T+S]` tells."""

    def rows(self, batch: int, queries: int, keys: int) -> int:
        return queries + keys

    def coordinates(self, batch: int, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        q_coord = torch.arange(keys - 1, keys - 1 + queries, dtype=torch.int32, device=device)
        k_coord = torch.arange(keys, dtype=torch.int32, device=device)
        return q_coord.repeat(batch), k_coord.repeat(batch)


@dataclass(frozen=True)
class KeyBias:
    """Table row j of its own for every key: a bias that no query changes. per_sample: row `b * S + j`."""

    per_sample: bool

    def rows(self, batch: int, queries: int, keys: int) -> int:
        return batch * keys if self.per_sample else keys

    def coordinates(self, batch: int, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        count = batch * keys if self.per_sample else keys
        k_coord = -torch.arange(count, dtype=torch.int32, device=device)
        q_coord = torch.zeros(batch * queries, dtype=torch.int32, device=device)
        return q_coord, k_coord if self.per_sample else k_coord.repeat(batch)


def padded_layout(
    batch: int,
    queries: int,
    keys: int,
    device: torch.device,
    *,
    masks: Sequence[Mask] = (),
    causal: bool = False,
    term: Term | None = None,
) -> AttentionLayout:
    """The layout of B samples of T queries and S keys, on `device`, with at most one relative term.

    masks: all must let a key pass; causal: query i sees keys `j <= i`. The term applies to every visible pair.
    Raises as `ofakern.nn.dropin.masks.runs`.
    """
    if torch.compiler.is_compiling():
        return _traced(batch, queries, keys, device, masks, causal, term)
    trusted = all(not mask.tensor.is_inference() for mask in masks)
    return (_by_identity if trusted else _by_content).get(batch, queries, keys, device, masks, causal, term)


def _build(
    batch: int,
    queries: int,
    keys: int,
    device: torch.device,
    masks: Sequence[Mask],
    causal: bool,
    term: Term | None,
) -> AttentionLayout:
    visible = torch.from_numpy(_visible(batch, queries, keys, masks, causal))
    terms = []
    if term is not None:
        coordinates = term.coordinates(batch, queries, keys, torch.device("cpu"))
        terms.append(RelativeTerm(*coordinates, visible, term.rows(batch, queries, keys)))
    return AttentionLayout.build(visible, [queries] * batch, [keys] * batch, terms).to(device)


def _visible(batch: int, queries: int, keys: int, masks: Sequence[Mask], causal: bool) -> np.ndarray:
    lo = np.zeros((batch, queries), np.int64)
    end = np.full((batch, queries), keys, np.int64)
    if causal:
        end = np.minimum(end, np.arange(queries) + 1)
    for mask in masks:
        first, last = runs(mask, batch, queries, keys)
        lo, end = np.maximum(lo, first), np.minimum(end, last)
    empty = end <= lo
    start = np.arange(batch)[:, None] * keys
    pairs = np.stack([np.where(empty, 0, lo + start), np.where(empty, 0, end + start)], axis=-1)
    result: np.ndarray = pairs.reshape(-1, 2).astype(np.int32)
    return result


_Signature = tuple[tuple[Any, ...], ...]


def _identity(mask: Mask) -> tuple[Any, ...]:
    return (weakref.ref(mask.tensor), mask.tensor._version)


def _same_identity(mark: tuple[Any, ...], mask: Mask) -> bool:
    return mark[0]() is mask.tensor and mark[1] == mask.tensor._version


def _content(mask: Mask) -> tuple[Any, ...]:
    return (mask.tensor.clone(),)


def _same_content(mark: tuple[Any, ...], mask: Mask) -> bool:
    return bool(torch.equal(mark[0], mask.tensor))


class _Cache:
    """The last layouts, by sizes and masks. `mark` notes a mask, `same` tells whether a noted mask is this one."""

    def __init__(
        self,
        size: int,
        key: Callable[[Mask], Any],
        mark: Callable[[Mask], tuple[Any, ...]],
        same: Callable[[tuple[Any, ...], Mask], bool],
    ) -> None:
        self.size, self.key, self.mark, self.same = size, key, mark, same
        self.entries: OrderedDict[Any, tuple[_Signature, AttentionLayout]] = OrderedDict()
        self.lock = threading.Lock()

    def get(
        self,
        batch: int,
        queries: int,
        keys: int,
        device: torch.device,
        masks: Sequence[Mask],
        causal: bool,
        term: Term | None,
    ) -> AttentionLayout:
        key = (batch, queries, keys, device, causal, term, tuple(self.key(mask) for mask in masks))
        with self.lock:
            entry = self.entries.get(key)
            if entry is not None and all(self.same(mark, mask) for mark, mask in zip(entry[0], masks, strict=True)):
                self.entries.move_to_end(key)
                return entry[1]
        layout = _build(batch, queries, keys, device, masks, causal, term)
        with self.lock:
            self.entries[key] = (tuple(self.mark(mask) for mask in masks), layout)
            self.entries.move_to_end(key)
            while len(self.entries) > self.size:
                self.entries.popitem(last=False)
        return layout


def _identity_key(mask: Mask) -> Any:
    return (id(mask.tensor), mask.kind, mask.left_out)


def _content_key(mask: Mask) -> Any:
    return (tuple(mask.tensor.shape), mask.tensor.dtype, mask.kind, mask.left_out)


_by_identity = _Cache(_ENTRIES, _identity_key, _identity, _same_identity)
_by_content = _Cache(_CONTENT_ENTRIES, _content_key, _content, _same_content)


def _traced(
    batch: int,
    queries: int,
    keys: int,
    device: torch.device,
    masks: Sequence[Mask],
    causal: bool,
    term: Term | None,
) -> AttentionLayout:
    """The same inside a graph: the op gives what depends on values, coordinates are plain arithmetic."""
    visible, q_offsets, k_offsets, key_seen, k_range = torch.ops.ofakern.padded_intervals(
        torch.empty(0, device=device),
        [mask.tensor for mask in masks],
        [f"{mask.kind} {int(mask.left_out)} {mask.where}" for mask in masks],
        batch,
        queries,
        keys,
        causal,
    )
    terms: tuple[RelativeTerm, ...] = ()
    if term is not None:
        coordinates = term.coordinates(batch, queries, keys, device)
        # A copy: tracing an autograd.Function refuses the same tensor twice.
        terms = (RelativeTerm(*coordinates, visible.clone(), term.rows(batch, queries, keys)),)
    return AttentionLayout(visible, q_offsets, k_offsets, key_seen, k_range, terms)


def _padded_intervals(
    like: Tensor, masks: list[Tensor], readings: list[str], batch: int, queries: int, keys: int, causal: bool
) -> tuple[Tensor, ...]:
    read = [_read_mask(tensor, reading) for tensor, reading in zip(masks, readings, strict=True)]
    layout = _by_content.get(batch, queries, keys, like.device, read, causal, None)
    # Copies: a compiler may write into what an op returned, and the cache's layout is shared.
    return tuple(
        tensor.clone()
        for tensor in (layout.visible, layout.q_offsets, layout.k_offsets, layout.key_seen, layout.k_range)
    )


def _read_mask(tensor: Tensor, reading: str) -> Mask:
    kind, left_out, where = reading.split(" ", 2)
    kinds: dict[str, Kind] = {"keys": "keys", "pairs": "pairs", "heads": "heads", "full": "full"}
    return Mask(tensor, kinds[kind], left_out == "1", where)


def _padded_intervals_fake(
    like: Tensor, masks: list[Tensor], readings: list[str], batch: int, queries: int, keys: int, causal: bool
) -> tuple[Tensor, ...]:
    return (
        like.new_empty((batch * queries, 2), dtype=torch.int32),
        like.new_empty((batch + 1,), dtype=torch.int32),
        like.new_empty((batch + 1,), dtype=torch.int32),
        like.new_empty((batch * keys,), dtype=torch.uint8),
        like.new_empty((batch, 2), dtype=torch.int32),
    )


LIBRARY.define(
    "padded_intervals(Tensor like, Tensor[] masks, str[] readings, SymInt batch, SymInt queries, SymInt keys, "
    "bool causal) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("padded_intervals", _padded_intervals, _device)
torch.library.register_fake("ofakern::padded_intervals", _padded_intervals_fake, lib=LIBRARY)
torch.library.register_vmap("ofakern::padded_intervals", refuse_vmap("padded_intervals"), lib=LIBRARY)

"""`AttentionLayout`s of padded batches, built once per batch and mask and shared by all layers that ask for the same.

Without torch.compile a layout is found again by the sizes and by the *identity* of the mask tensors (and their version:
a mask written to in place is read anew). Inside a compiled graph, and for inference tensors, which count no versions,
a registered op compares contents instead: compilers reuse buffers without telling.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.nn.dropin.masks import Kind, Mask, runs
from ofakern.nn.relative import grid_extent, special_coordinates
from ofakern.ops.attention import AttentionLayout, RelativeTerm
from ofakern.ops.library import LIBRARY, refuse_vmap

T = TypeVar("T")

_ENTRIES = 64
_CONTENT_ENTRIES = 4  # each keeps a copy of its masks


class Term(ABC):
    """Coordinates of a padded batch; hashable, because layouts are cached by it."""

    @abstractmethod
    def terms(
        self, batch: int, queries: int, keys: int, device: torch.device, visible: Tensor
    ) -> tuple[RelativeTerm, ...]:
        """The terms of a packed batch whose intervals are `visible` (a tensor of the caller's own)."""


class _Everywhere(Term):
    """One term for every visible pair."""

    @abstractmethod
    def rows(self, batch: int, queries: int, keys: int) -> int:
        """Rows of the table that the coordinates read."""

    @abstractmethod
    def coordinates(self, batch: int, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """q_coord int32 `[B*T]`, k_coord int32 `[B*S]`."""

    def terms(
        self, batch: int, queries: int, keys: int, device: torch.device, visible: Tensor
    ) -> tuple[RelativeTerm, ...]:
        coordinates = self.coordinates(batch, queries, keys, device)
        return (RelativeTerm(*coordinates, visible, self.rows(batch, queries, keys)),)


@dataclass(frozen=True)
class Shift(_Everywhere):
    """Table row `i - j + S - 1`: query minus key position. One row more than differences, so that `[.., T+S]` tells."""

    def rows(self, batch: int, queries: int, keys: int) -> int:
        return queries + keys

    def coordinates(self, batch: int, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        q_coord = torch.arange(keys - 1, keys - 1 + queries, dtype=torch.int32, device=device)
        k_coord = torch.arange(keys, dtype=torch.int32, device=device)
        return q_coord.repeat(batch), k_coord.repeat(batch)


@dataclass(frozen=True)
class KeyBias(_Everywhere):
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
    front: int = 0,
    term: Term | None = None,
) -> AttentionLayout:
    """The layout of B samples of T queries and S keys, on `device`, with at most one relative term.

    masks: all must let a key pass; causal: query i sees keys `j <= i`. front: how many of a sample's first keys every
    query sees; masks and causality are about the others. The term applies to every visible pair.
    Raises as `ofakern.nn.dropin.masks.runs`, and OfakernValueError when front and masked keys are not one run.
    """
    sizes = _Sizes(batch, queries, keys, front, causal)
    if torch.compiler.is_compiling():
        return _traced(sizes, device, masks, term)
    trusted = all(not mask.tensor.is_inference() for mask in masks)
    cache = _by_identity if trusted else _by_content
    return cache.get((sizes, device, term), masks, lambda: _build(sizes, device, masks, term))


@dataclass(frozen=True)
class Grid(_Everywhere):
    """A grid of height x width tokens, row-major, after one special token where `special`. Row `d + M` of the table is
    the difference d of coordinates; with the special token 5M + 4 rows (`ofakern.nn.relative.with_special`)."""

    height: int
    width: int
    special: bool

    def rows(self, batch: int, queries: int, keys: int) -> int:
        extent = grid_extent(self.height, self.width)
        return 5 * extent + 4 if self.special else 2 * extent + 1

    def coordinates(self, batch: int, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        extent = grid_extent(self.height, self.width)
        down = torch.arange(self.height, dtype=torch.int32, device=device)[:, None] * (2 * self.width - 1)
        k_coord = (down + torch.arange(self.width, dtype=torch.int32, device=device)).reshape(-1)
        q_coord = k_coord + extent
        if self.special:
            query, key = special_coordinates(extent)
            origin = 2 * extent + 1
            q_coord = torch.cat([q_coord.new_full((1,), query + origin), k_coord + origin])
            k_coord = torch.cat([k_coord.new_full((1,), key), k_coord])
        return q_coord.repeat(batch), k_coord.repeat(batch)


@dataclass(frozen=True, eq=False)
class Given(Term):
    """Coordinates counted inside a sample: q_coord int32 `[T]`, k_coord int32 `[S]`, same int32 `[T,2]`; the same for
    every sample. Known again by identity: keep the object."""

    given: tuple[RelativeTerm, ...]

    def terms(
        self, batch: int, queries: int, keys: int, device: torch.device, visible: Tensor
    ) -> tuple[RelativeTerm, ...]:
        start = torch.arange(batch, dtype=torch.int32, device=device)[:, None, None] * keys
        return tuple(
            RelativeTerm(
                term.q_coord.to(device).repeat(batch),
                term.k_coord.to(device).repeat(batch),
                (term.same.to(device) + start).reshape(-1, 2),
                term.rows,
            )
            for term in self.given
        )


class _Sizes(NamedTuple):
    batch: int
    queries: int
    keys: int
    front: int
    causal: bool


def _build(sizes: _Sizes, device: torch.device, masks: Sequence[Mask], term: Term | None) -> AttentionLayout:
    batch, queries, keys = sizes[:3]
    visible = torch.from_numpy(_visible(sizes, masks))
    terms = () if term is None else term.terms(batch, queries, keys, torch.device("cpu"), visible)
    return AttentionLayout.build(visible, [queries] * batch, [keys] * batch, terms).to(device)


def _visible(sizes: _Sizes, masks: Sequence[Mask]) -> np.ndarray:
    batch, queries, keys, front, causal = sizes
    own = keys - front
    lo = np.zeros((batch, queries), np.int64)
    end = np.full((batch, queries), own, np.int64)
    if causal:
        end = np.minimum(end, np.arange(queries) + 1)
    for mask in masks:
        first, last = runs(mask, batch, queries, own)
        lo, end = np.maximum(lo, first), np.minimum(end, last)
    empty = end <= lo
    lo, end = np.where(empty, 0, lo), np.where(empty, 0, end) + front
    if front and lo.any():
        where = masks[0].where if masks else "attention"
        raise OfakernValueError(
            f"{where}: mask must leave out keys at the end only beside keys that all queries see, got a sample whose "
            "first keys are left out\nTry: padding at the end."
        )
    start = np.where(end > lo, np.arange(batch)[:, None] * keys, 0)
    result: np.ndarray = np.stack([lo + start, end + start], axis=-1).reshape(-1, 2).astype(np.int32)
    return result


def _identity(mask: Mask) -> tuple[Any, ...]:
    return (weakref.ref(mask.tensor), mask.tensor._version)


def _same_identity(mark: tuple[Any, ...], mask: Mask) -> bool:
    return mark[0]() is mask.tensor and mark[1] == mask.tensor._version


def _content(mask: Mask) -> tuple[Any, ...]:
    return (mask.tensor.clone(),)


def _same_content(mark: tuple[Any, ...], mask: Mask) -> bool:
    return bool(torch.equal(mark[0], mask.tensor))


class MaskCache(Generic[T]):
    """The last results that follow from masks. `mark` notes a mask, `same` tells whether a noted mask is this one."""

    def __init__(
        self,
        size: int,
        key: Callable[[Mask], Any],
        mark: Callable[[Mask], tuple[Any, ...]],
        same: Callable[[tuple[Any, ...], Mask], bool],
    ) -> None:
        self.size, self.key, self.mark, self.same = size, key, mark, same
        self.entries: OrderedDict[Any, tuple[tuple[tuple[Any, ...], ...], T]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, what: Any, masks: Sequence[Mask], build: Callable[[], T]) -> T:
        """The result kept for `what` (hashable) and these masks, or `build()`."""
        key = (what, tuple(self.key(mask) for mask in masks))
        with self.lock:
            entry = self.entries.get(key)
            if entry is not None and all(self.same(mark, mask) for mark, mask in zip(entry[0], masks, strict=True)):
                self.entries.move_to_end(key)
                return entry[1]
        result = build()
        with self.lock:
            self.entries[key] = (tuple(self.mark(mask) for mask in masks), result)
            self.entries.move_to_end(key)
            while len(self.entries) > self.size:
                self.entries.popitem(last=False)
        return result


def _identity_key(mask: Mask) -> Any:
    return (id(mask.tensor), mask.kind, mask.left_out)


def _content_key(mask: Mask) -> Any:
    return (tuple(mask.tensor.shape), mask.tensor.dtype, mask.kind, mask.left_out)


def content_cache() -> MaskCache[Any]:
    """A cache for masks that are made anew with equal content."""
    return MaskCache(_CONTENT_ENTRIES, _content_key, _content, _same_content)


_by_identity: MaskCache[AttentionLayout] = MaskCache(_ENTRIES, _identity_key, _identity, _same_identity)
_by_content: MaskCache[AttentionLayout] = content_cache()


def _traced(sizes: _Sizes, device: torch.device, masks: Sequence[Mask], term: Term | None) -> AttentionLayout:
    """The same inside a graph: the op gives what depends on values, coordinates are plain arithmetic."""
    visible, q_offsets, k_offsets, key_seen, k_range = torch.ops.ofakern.padded_intervals(
        torch.empty(0, device=device),
        [mask.tensor for mask in masks],
        [f"{mask.kind} {int(mask.left_out)} {mask.where}" for mask in masks],
        *sizes,
    )
    # A copy: tracing an autograd.Function refuses the same tensor twice.
    terms = () if term is None else term.terms(*sizes[:3], device, visible.clone())
    return AttentionLayout(visible, q_offsets, k_offsets, key_seen, k_range, terms)


def _padded_intervals(like: Tensor, masks: list[Tensor], readings: list[str], *sizes: Any) -> tuple[Tensor, ...]:
    read = [_read_mask(tensor, reading) for tensor, reading in zip(masks, readings, strict=True)]
    made, device = _Sizes(*sizes), like.device
    layout = _by_content.get((made, device, None), read, lambda: _build(made, device, read, None))
    # Copies: a compiler may write into what an op returned, and the cache's layout is shared.
    return tuple(
        tensor.clone()
        for tensor in (layout.visible, layout.q_offsets, layout.k_offsets, layout.key_seen, layout.k_range)
    )


def _read_mask(tensor: Tensor, reading: str) -> Mask:
    kind, left_out, where = reading.split(" ", 2)
    kinds: dict[str, Kind] = {"keys": "keys", "pairs": "pairs", "heads": "heads", "full": "full"}
    return Mask(tensor, kinds[kind], left_out == "1", where)


def _padded_intervals_fake(like: Tensor, masks: list[Tensor], readings: list[str], *sizes: Any) -> tuple[Tensor, ...]:
    batch, queries, keys = sizes[:3]
    return (
        like.new_empty((batch * queries, 2), dtype=torch.int32),
        like.new_empty((batch + 1,), dtype=torch.int32),
        like.new_empty((batch + 1,), dtype=torch.int32),
        like.new_empty((batch * keys,), dtype=torch.uint8),
        like.new_empty((batch, 2), dtype=torch.int32),
    )


LIBRARY.define(
    "padded_intervals(Tensor like, Tensor[] masks, str[] readings, SymInt batch, SymInt queries, SymInt keys, "
    "SymInt front, bool causal) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("padded_intervals", _padded_intervals, _device)
torch.library.register_fake("ofakern::padded_intervals", _padded_intervals_fake, lib=LIBRARY)
torch.library.register_vmap("ofakern::padded_intervals", refuse_vmap("padded_intervals"), lib=LIBRARY)

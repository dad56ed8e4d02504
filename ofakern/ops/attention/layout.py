"""`AttentionLayout`: what does not change from layer to layer, built and validated once per batch on the CPU.

The fields are the plain tensors of `AttentionLayoutView` in csrc/ops/attention/attention.h. A layout is a pytree, so it
can be an argument of compiled and exported functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from ofakern.errors import OfakernError, OfakernTypeError, OfakernValueError
from ofakern.ops import native
from ofakern.ops.attention.intervals import Lengths, as_lengths, check_intervals, starts
from ofakern.ops.attention.shared import SharedPositions, share_rows

_WHERE = "AttentionLayout"
_ALIGNMENT = 64  # bytes, of a tensor's first element


@dataclass(frozen=True)
class RelativeTerm:
    """A bias `table[h, q_coord[i] - k_coord[j]]` for the keys of `same[i]` that query i sees.

    q_coord int32 `[Nq]`, k_coord int32 `[Nk]`, same int32 `[Nq,2]`, rows: the number of rows R of the table `[H,R]`.
    Coordinates outside `same` and `visible` may be any integers.
    """

    q_coord: Tensor
    k_coord: Tensor
    same: Tensor
    rows: int

    def map(self, convert: Callable[[Tensor], Tensor]) -> RelativeTerm:
        return RelativeTerm(convert(self.q_coord), convert(self.k_coord), convert(self.same), self.rows)


@dataclass(frozen=True)
class AttentionLayout:
    """Intervals and coordinates of one batch. Make it with `build`; the constructor checks nothing.

    visible int32 `[Nq,2]`; q_offsets, k_offsets int32 `[B+1]`; key_seen uint8 `[Nk]`, 1 when some query sees the key;
    k_range int32 `[B,2]`, hull of the keys that the sample's queries see (0,0 when none); at most two terms.
    shared: which samples take the same rows of q_pos and k_pos, where some do.
    """

    visible: Tensor
    q_offsets: Tensor
    k_offsets: Tensor
    key_seen: Tensor
    k_range: Tensor
    terms: tuple[RelativeTerm, ...] = ()
    shared: SharedPositions | None = None

    @property
    def queries(self) -> int:
        return self.visible.shape[0]

    @property
    def keys(self) -> int:
        return self.key_seen.shape[0]

    @property
    def samples(self) -> int:
        return self.k_range.shape[0]

    @property
    def device(self) -> torch.device:
        return self.visible.device

    @cached_property
    def checked(self) -> Any:
        """What the CPU kernel keeps of the layout, its values checked, for calls past the dispatcher.

        None on another device, and where it does not take the tensors as they are.
        """
        if self.device.type != "cpu":
            return None
        first, second, fixed = self.list_arguments()
        rows = [term.rows for term in self.terms] + [-1] * (2 - len(self.terms))
        sharing = (0, 0) if self.shared is None else (self.shared.q_rows, self.shared.k_rows)
        try:
            return native.kernels.attention_layout((*first, *second, *fixed), *rows, *sharing)
        except OfakernError:
            return None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has the fields alone: what the kernel keeps stays in its process."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def list_arguments(self) -> tuple[tuple[Tensor | None, ...], ...]:
        """What kernels take of it, in their order: q_coord, k_coord and same of two terms (None where there is none),
        then visible, q_offsets, k_offsets, key_seen, k_range and the sets and members of `shared`."""
        first, second = [(term.q_coord, term.k_coord, term.same) for term in self.terms] + [(None,) * 3] * (
            2 - len(self.terms)
        )
        sharing = (None, None) if self.shared is None else (self.shared.sets, self.shared.members)
        fixed = (self.visible, self.q_offsets, self.k_offsets, self.key_seen, self.k_range, *sharing)
        return first, second, fixed

    @classmethod
    def build(
        cls,
        visible: Tensor,
        q_lengths: Lengths,
        k_lengths: Lengths,
        terms: Sequence[RelativeTerm] = (),
        q_sets: Sequence[int] | None = None,
        k_sets: Sequence[int] | None = None,
    ) -> AttentionLayout:
        """Validates a batch's intervals and coordinates and derives what kernels need; O(N log N), vectorised.

        visible int32 `[Nq,2]`: query i sees keys `visible[i,0] <= j < visible[i,1]`, numbered over the whole batch
        (`ofakern.ops.attention.intervals` builds them). q_lengths, k_lengths: tokens of each of the B samples, summing
        to Nq and Nk. terms: at most two. All tensors on the CPU; `to(device)` moves the result.
        q_sets, k_sets (both or neither): of each sample, the number of the set of rows it takes of q_pos and of k_pos.
        Sets 0, 1, ... stand end to end, each as long as its longest sample, and token t of a sample takes row t of its
        set: samples whose tokens have the same positions share them. Their queries see keys of their own sample only.
        Raises OfakernTypeError and OfakernValueError: wrong dtypes and shapes, intervals outside the keys or reversed,
        and tables too short (or coordinates too small) for a pair that reads them.
        """
        q_counts = as_lengths(_WHERE, "q_lengths", q_lengths)
        k_counts = as_lengths(_WHERE, "k_lengths", k_lengths, samples=len(q_counts))
        queries, keys = int(q_counts.sum()), int(k_counts.sum())
        check_intervals(_WHERE, "visible", visible, queries, keys)
        if len(terms) > 2:
            raise OfakernValueError(f"{_WHERE}: terms must be at most two, got {len(terms)}")
        window = visible.numpy()
        for number, term in enumerate(terms):
            _check_term(f"terms[{number}]", term, window, queries, keys)
        k_range = _k_range(window, q_counts)
        layout = cls(
            visible=visible,
            q_offsets=_offsets(q_counts),
            k_offsets=_offsets(k_counts),
            key_seen=torch.from_numpy(_key_seen(window, keys)),
            k_range=torch.from_numpy(k_range),
            terms=tuple(terms),
            shared=share_rows(_WHERE, q_sets, k_sets, q_counts, k_counts, k_range),
        )
        return layout._in_one_piece()

    @classmethod
    def even(cls, samples: int, queries: int, keys: int, device: torch.device | str) -> AttentionLayout:
        """What `build` makes of samples of so many queries each, which see all of their sample's so many keys.

        It is made on the device, to which nothing is copied: a step that is recorded (CUDA graphs) may call it.
        """

        def steps(count: int, width: int) -> Tensor:
            return torch.arange(count, dtype=torch.int32, device=device) * width

        begin, seen = steps(samples, keys), int(queries > 0)
        k_range = torch.stack([begin, begin + keys], dim=1) * seen
        return cls(
            visible=k_range[:, None].expand(-1, queries, -1).reshape(-1, 2).contiguous(),
            q_offsets=steps(samples + 1, queries),
            k_offsets=steps(samples + 1, keys),
            key_seen=torch.full((samples * keys,), seen, dtype=torch.uint8, device=device),
            k_range=k_range,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionLayout:
        """The same layout on a device; itself when it is there already."""
        if self.device == torch.device(device):
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AttentionLayout:
        """A copy in page-locked memory (torch's DataLoader calls this when it pins batches)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _in_one_piece(self) -> AttentionLayout:
        """A copy whose tensors stand in one tensor's memory: a call that sees it unmoved has looked at all of them."""
        end = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal end
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            return tensor

        self._map(count)
        memory, end = torch.empty(end, dtype=torch.uint8), 0

        def place(tensor: Tensor) -> Tensor:
            start = end
            count(tensor)
            return memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

        return self._map(place)

    def _map(self, convert: Callable[[Tensor], Tensor]) -> AttentionLayout:
        return AttentionLayout(
            convert(self.visible),
            convert(self.q_offsets),
            convert(self.k_offsets),
            convert(self.key_seen),
            convert(self.k_range),
            tuple(term.map(convert) for term in self.terms),
            None if self.shared is None else self.shared.map(convert),
        )


_pytree.register_dataclass(RelativeTerm, serialized_type_name="ofakern.RelativeTerm")
_pytree.register_dataclass(AttentionLayout, serialized_type_name="ofakern.AttentionLayout")


def _offsets(counts: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


def _key_seen(window: np.ndarray, keys: int) -> np.ndarray:
    lo, hi = window[window[:, 1] > window[:, 0]].T
    steps = np.bincount(lo, minlength=keys + 1) - np.bincount(hi, minlength=keys + 1)
    seen: np.ndarray = (np.cumsum(steps)[:keys] > 0).astype(np.uint8)
    return seen


def _k_range(window: np.ndarray, q_counts: np.ndarray) -> np.ndarray:
    hull = np.zeros((len(q_counts), 2), dtype=np.int32)
    busy = q_counts > 0  # reduceat cannot take empty groups
    if busy.any():
        first = starts(q_counts)[busy]
        empty = window[:, 1] <= window[:, 0]
        lo = np.minimum.reduceat(np.where(empty, np.iinfo(np.int32).max, window[:, 0]), first)
        hi = np.maximum.reduceat(np.where(empty, 0, window[:, 1]), first)
        hull[busy] = np.stack([np.where(hi > 0, lo, 0), hi], axis=1)
    return hull


def _check_term(name: str, term: RelativeTerm, window: np.ndarray, queries: int, keys: int) -> None:
    if not isinstance(term, RelativeTerm):
        raise OfakernTypeError(f"{_WHERE}: {name} must be a RelativeTerm, got {type(term).__name__}")
    check_intervals(_WHERE, f"{name}.same", term.same, queries, keys)
    _check_coordinates(f"{name}.q_coord", term.q_coord, "Nq", queries)
    _check_coordinates(f"{name}.k_coord", term.k_coord, "Nk", keys)
    if isinstance(term.rows, bool) or not isinstance(term.rows, int):
        raise OfakernTypeError(f"{_WHERE}: {name}.rows must be an int, got {type(term.rows).__name__}")
    if term.rows < 0:
        raise OfakernValueError(f"{_WHERE}: {name}.rows must be at least 0, got {term.rows}")
    same = term.same.numpy()
    lo, hi = np.maximum(same[:, 0], window[:, 0]), np.minimum(same[:, 1], window[:, 1])
    query = np.flatnonzero(hi > lo)
    if query.size == 0:
        return
    smallest, largest = _range_extrema(term.k_coord.numpy(), lo[query], hi[query])
    q_coord = term.q_coord.numpy()[query].astype(np.int64)
    low, high = q_coord - largest, q_coord - smallest
    if low.min() < 0 or high.max() >= term.rows:
        i = int(np.argmax((low < 0) | (high >= term.rows)))
        raise OfakernValueError(
            f"{_WHERE}: {name} must read rows within [0, {term.rows}), got rows {int(low[i])}..{int(high[i])} "
            f"at query {int(query[i])} (all queries: {int(low.min())}..{int(high.max())})\n"
            "Try: a longer table, a larger origin in q_coord, or narrower same intervals."
        )


def _check_coordinates(name: str, coordinates: Tensor, letter: str, count: int) -> None:
    if not isinstance(coordinates, Tensor) or coordinates.dtype != torch.int32:
        got = coordinates.dtype if isinstance(coordinates, Tensor) else type(coordinates).__name__
        raise OfakernTypeError(f"{_WHERE}: {name} must be an int32 tensor, got {got}")
    if coordinates.device.type != "cpu":
        raise OfakernValueError(f"{_WHERE}: {name} must be on the CPU, got {coordinates.device}")
    if tuple(coordinates.shape) != (count,):
        raise OfakernValueError(f"{_WHERE}: {name} must have shape [{letter}={count}], got {list(coordinates.shape)}")


def _range_extrema(values: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """min and max of values over each non-empty `[lo, hi)`, by a sparse table (two powers of two cover a range)."""
    level_of = np.frexp((hi - lo).astype(np.float64))[1] - 1  # floor(log2(length)), exact
    smallest, largest = np.empty(len(lo), np.int64), np.empty(len(lo), np.int64)
    small = large = values
    for level in range(int(level_of.max()) + 1):
        width = 1 << level
        if level:
            half = width >> 1
            small = np.minimum(small[:-half], small[half:])
            large = np.maximum(large[:-half], large[half:])
        at = np.flatnonzero(level_of == level)
        if at.size:
            left, right = lo[at], hi[at] - width
            smallest[at] = np.minimum(small[left], small[right])
            largest[at] = np.maximum(large[left], large[right])
    return smallest, largest

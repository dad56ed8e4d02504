"""`SharedPositions`: samples of a batch that take the same rows of q_pos and k_pos.

The factored term of such samples is computed once and used by all; its gradient comes from their summed score
gradients. Backends that know nothing of it take the rows spelled out for every token (`spelled_out`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from ofakern.errors import OfakernTypeError, OfakernValueError


@dataclass(frozen=True)
class SharedPositions:
    """Which samples share rows; `AttentionLayout.build` makes it.

    sets int32 `[U,4]`: of each set of samples that take the same rows of both, its first and last + 1 in members, its
    first row of q_pos and of k_pos; members int32 `[B]`: every sample once, the longest of a set first. q_index int32
    `[Nq]`, k_index int32 `[Nk]`: each token's row. q_rows, k_rows: how many rows q_pos and k_pos have.
    """

    sets: Tensor
    members: Tensor
    q_index: Tensor
    k_index: Tensor
    q_rows: int
    k_rows: int

    def map(self, convert: Callable[[Tensor], Tensor]) -> SharedPositions:
        return SharedPositions(
            convert(self.sets),
            convert(self.members),
            convert(self.q_index),
            convert(self.k_index),
            self.q_rows,
            self.k_rows,
        )

    def spelled_out(self, q_pos: Tensor, k_pos: Tensor) -> tuple[Tensor, Tensor]:
        """q_pos `[Nq,H,P]`, k_pos `[Nk,Hk,P]` with a row per token; the gradient's order is always the same."""
        # Not index_select: on GPUs its gradient is added atomically, that of indexing is sorted first.
        return q_pos[self.q_index.long()], k_pos[self.k_index.long()]


_pytree.register_dataclass(SharedPositions, serialized_type_name="ofakern.SharedPositions")


def share_rows(
    where: str,
    q_sets: Sequence[int] | None,
    k_sets: Sequence[int] | None,
    q_counts: np.ndarray,
    k_counts: np.ndarray,
    k_range: np.ndarray,
) -> SharedPositions | None:
    """What `AttentionLayout.build` says of q_sets and k_sets; counts `[B]`: tokens per sample, k_range `[B,2]`: the
    hull of the keys that they see."""
    if q_sets is None and k_sets is None:
        return None
    if q_sets is None or k_sets is None:
        missing, given = ("q_sets", "k_sets") if q_sets is None else ("k_sets", "q_sets")
        raise OfakernValueError(f"{where}: {missing} must be given together with {given}, got None")
    q_first, q_rows = _first_rows(where, "q_sets", q_sets, q_counts)
    k_first, k_rows = _first_rows(where, "k_sets", k_sets, k_counts)
    _check_own_keys(where, k_counts, k_range)
    order = np.lexsort((-k_counts, -q_counts, k_first, q_first))
    pairs = np.stack([q_first, k_first], axis=1)[order]
    begins = np.flatnonzero(np.r_[True, np.any(pairs[1:] != pairs[:-1], axis=1)]) if len(order) else order
    ends = np.r_[begins[1:], len(order)] if len(order) else order
    sets = np.concatenate([np.stack([begins, ends], axis=1), pairs[begins]], axis=1)
    return SharedPositions(
        sets=torch.from_numpy(sets.astype(np.int32)),
        members=torch.from_numpy(order.astype(np.int32)),
        q_index=_index(q_first, q_counts),
        k_index=_index(k_first, k_counts),
        q_rows=q_rows,
        k_rows=k_rows,
    )


def same_prefixes(codes: np.ndarray, counts: np.ndarray) -> tuple[list[int], list[int]]:
    """Of each sample the number of its set, and of each set its longest sample.

    codes int64 `[N]`: equal numbers stand for equal positions; counts `[B]`: tokens per sample, end to end. Samples
    share a set where the codes of the shorter are how those of the set's longest begin.
    """
    runs = np.split(codes, np.cumsum(counts)[:-1]) if len(counts) else []
    by_start: dict[int, list[int]] = {}  # first code -> samples that lead a set
    leader = np.zeros(len(counts), dtype=np.int64)
    for sample in np.argsort(-counts, kind="stable").tolist():
        own = runs[sample]
        candidates = by_start.setdefault(int(own[0]) if own.size else -1, [])
        found = next((other for other in candidates if np.array_equal(runs[other][: own.size], own)), None)
        if found is None:
            candidates.append(sample)
        leader[sample] = sample if found is None else found
    leaders, sets = np.unique(leader, return_inverse=True)
    return sets.tolist(), leaders.tolist()


def _first_rows(where: str, name: str, sets: Sequence[int], counts: np.ndarray) -> tuple[np.ndarray, int]:
    """Each sample's first row, and how many rows the sets have."""
    if len(sets) != len(counts):
        raise OfakernValueError(f"{where}: {name} must be one per sample ({len(counts)}), got {len(sets)}")
    numbers = np.asarray(sets)
    if numbers.size and not np.issubdtype(numbers.dtype, np.integer):
        raise OfakernTypeError(f"{where}: {name} must be integers, got {numbers.dtype}")
    numbers = numbers.astype(np.int64)
    if numbers.size and not np.array_equal(np.unique(numbers), np.arange(numbers.max() + 1)):
        raise OfakernValueError(f"{where}: {name} must number the sets 0, 1, ... without gaps, got {numbers.tolist()}")
    longest = np.zeros(int(numbers.max()) + 1 if numbers.size else 0, dtype=np.int64)
    np.maximum.at(longest, numbers, counts)
    first = np.cumsum(longest) - longest
    return first[numbers], int(longest.sum())


def _check_own_keys(where: str, k_counts: np.ndarray, k_range: np.ndarray) -> None:
    ends = np.cumsum(k_counts)
    foreign = (k_range[:, 0] < k_range[:, 1]) & ((k_range[:, 0] < ends - k_counts) | (k_range[:, 1] > ends))
    if foreign.any():
        s = int(np.argmax(foreign))
        raise OfakernValueError(
            f"{where}: visible must lie inside each sample's own keys where samples share positions, "
            f"got keys {k_range[s].tolist()} for sample {s} of keys [{int(ends[s] - k_counts[s])}, {int(ends[s])}]"
        )


def _index(first: np.ndarray, counts: np.ndarray) -> Tensor:
    starts = np.cumsum(counts) - counts
    rows = np.arange(int(counts.sum())) + np.repeat(first - starts, counts)
    return torch.from_numpy(rows.astype(np.int32))

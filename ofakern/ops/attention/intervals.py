"""Builders of the intervals that `attention` takes as masks: int32 `[Nq,2]`, query i sees keys `lo <= j < hi`.

Tokens of all samples stand end to end; lengths are tokens per sample (ints, or an integer tensor on the CPU).
The same builders make `same` of a relative term: `full` over the lengths of the segments gives each token its segment.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ofakern.errors import OfakernTypeError, OfakernValueError

Lengths = Sequence[int] | Tensor

_INT32_MAX = 2**31 - 1


def full(lengths: Lengths) -> Tensor:
    """Every token sees its whole sample (or segment)."""
    counts = as_lengths("full", "lengths", lengths)
    start = starts(counts)
    return _pack(np.repeat(start, counts), np.repeat(start + counts, counts))


def causal(lengths: Lengths) -> Tensor:
    """Every token sees itself and what stands before it in its sample."""
    counts = as_lengths("causal", "lengths", lengths)
    return _pack(np.repeat(starts(counts), counts), np.arange(counts.sum()) + 1)


def prefix_lm(lengths: Lengths, prefix_lengths: Lengths) -> Tensor:
    """Causal, but the first `prefix_lengths[s]` tokens of sample s see each other both ways."""
    counts = as_lengths("prefix_lm", "lengths", lengths)
    prefix = as_lengths("prefix_lm", "prefix_lengths", prefix_lengths, samples=len(counts))
    if (prefix > counts).any():
        s = int(np.argmax(prefix > counts))
        raise OfakernValueError(
            f"prefix_lm: prefix_lengths[{s}] must be at most lengths[{s}] = {counts[s]}, got {prefix[s]}"
        )
    start = starts(counts)
    hi = np.maximum(np.arange(counts.sum()) + 1, np.repeat(start + prefix, counts))
    return _pack(np.repeat(start, counts), hi)


def sliding_window(lengths: Lengths, window: int) -> Tensor:
    """Causal with memory: token l of a sample sees tokens `max(0, l - window) .. l`, `window + 1` of them at most."""
    counts = as_lengths("sliding_window", "lengths", lengths)
    if window < 0:
        raise OfakernValueError(f"sliding_window: window must be at least 0, got {window}")
    position = np.arange(counts.sum())
    return _pack(np.maximum(position - window, np.repeat(starts(counts), counts)), position + 1)


def cross(q_lengths: Lengths, k_lengths: Lengths) -> Tensor:
    """Every query of sample s sees all keys of sample s."""
    queries = as_lengths("cross", "q_lengths", q_lengths)
    keys = as_lengths("cross", "k_lengths", k_lengths, samples=len(queries))
    start = starts(keys)
    return _pack(np.repeat(start, queries), np.repeat(start + keys, queries))


def with_prefix_keys(
    intervals: Tensor, q_lengths: Lengths, k_lengths: Lengths, prefix_length: int, *, visible: bool
) -> Tensor:
    """Renumbers intervals for keys that gain `prefix_length` prefix keys at the front of every sample.

    intervals were built for `k_lengths`; the keys are then `[prefix of sample 0, keys of sample 0, prefix of sample 1,
    ...]`, and the layout's key lengths are `k_lengths + prefix_length`. With `visible=True` every query also sees its
    sample's prefix, so its interval must begin where its sample's keys begin (or be empty); with `visible=False` (a
    term's `same`) it does not.
    """
    where = "with_prefix_keys"
    queries = as_lengths(where, "q_lengths", q_lengths)
    keys = as_lengths(where, "k_lengths", k_lengths, samples=len(queries))
    if prefix_length < 0:
        raise OfakernValueError(f"{where}: prefix_length must be at least 0, got {prefix_length}")
    check_intervals(where, "intervals", intervals, int(queries.sum()), int(keys.sum()))
    lo, hi = intervals.numpy().astype(np.int64).T
    sample = np.repeat(np.arange(len(queries)), queries)
    shift = (sample + 1) * prefix_length
    if not visible:
        return _pack(lo + shift, hi + shift)
    start = starts(keys)[sample]
    wrong = (hi > lo) & (lo != start)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise OfakernValueError(
            f"{where}: intervals[{i}] must begin at its sample's first key {start[i]}, got {(int(lo[i]), int(hi[i]))}\n"
            "Try: two calls of attention merged by their log-sum-exp; prefix and window are not one interval."
        )
    empty = hi == lo
    return _pack(np.where(empty, 0, start + shift - prefix_length), np.where(empty, 0, hi + shift))


def intervals_from_mask(mask: Tensor) -> Tensor:
    """Intervals `[B*T,2]` of a boolean mask `[T,S]`, `[B,T,S]` or `[B,H,T,S]` (True: the key takes part).

    Key j of sample b has the number `b * S + j`: samples stay padded where they are. Each row must be one run of True
    (or none), the same for every head; anything else is refused with its place. Copies the mask to the CPU.
    """
    where = "intervals_from_mask"
    if mask.dtype != torch.bool:
        raise OfakernTypeError(
            f"{where}: mask must be a bool tensor, got {mask.dtype}\n"
            "Try: mask > threshold for a mask of 0 and -inf; a learned bias goes into relative terms or q_pos, k_pos."
        )
    if mask.ndim not in (2, 3, 4):
        raise OfakernValueError(f"{where}: mask must be [T,S], [B,T,S] or [B,H,T,S], got {list(mask.shape)}")
    rows = mask.detach().cpu()
    if rows.ndim == 2:
        rows = rows[None]
    if rows.ndim == 4:
        if rows.shape[1] == 0:
            raise OfakernValueError(f"{where}: mask must have at least one head, got {list(mask.shape)}")
        if rows.shape[1] > 1 and not bool((rows == rows[:, :1]).all()):
            raise OfakernValueError(
                f"{where}: mask must be the same for every head, got {list(mask.shape)} that differs"
            )
        rows = rows[:, 0]
    batch, queries, keys = rows.shape
    if keys == 0:
        return torch.zeros(batch * queries, 2, dtype=torch.int32)
    allowed = rows.numpy()
    count = allowed.sum(-1)
    lo = np.where(count > 0, allowed.argmax(-1), 0)
    last = np.where(count > 0, keys - allowed[..., ::-1].argmax(-1), 0)
    if (last - lo != count).any():
        b, i = (int(x) for x in np.argwhere(last - lo != count)[0])
        raise OfakernValueError(
            f"{where}: mask must be one run of keys per query, got holes in sample {b}, query {i}\n"
            "Try: pack the real keys of a sample next to each other, or merge two calls by their log-sum-exp."
        )
    base = np.where(count > 0, np.arange(batch)[:, None] * keys, 0)
    return _pack((lo + base).ravel(), (last + base).ravel())


def as_lengths(where: str, name: str, lengths: Lengths, samples: int | None = None) -> np.ndarray:
    """Lengths as int64 `[B]`, checked: integers, not negative, as many as samples."""
    if isinstance(lengths, Tensor):
        if lengths.device.type != "cpu":
            raise OfakernValueError(f"{where}: {name} must be on the CPU, got {lengths.device}")
        counts = lengths.detach().numpy()
    else:
        counts = np.asarray(lengths)
    if counts.ndim != 1:
        raise OfakernValueError(f"{where}: {name} must be one number per sample, got shape {list(counts.shape)}")
    if counts.size and counts.dtype.kind not in "iu":
        raise OfakernTypeError(f"{where}: {name} must be integers, got {counts.dtype}")
    counts = counts.astype(np.int64)
    if (counts < 0).any():
        raise OfakernValueError(f"{where}: {name} must be at least 0, got {int(counts.min())}")
    if samples is not None and len(counts) != samples:
        raise OfakernValueError(f"{where}: {name} must have one number per sample ({samples}), got {len(counts)}")
    if counts.sum() > _INT32_MAX:
        raise OfakernValueError(f"{where}: {name} must sum to at most 2^31 - 1, got {int(counts.sum())}")
    return counts


def starts(counts: np.ndarray) -> np.ndarray:
    """First packed index of each sample."""
    result: np.ndarray = np.cumsum(counts) - counts
    return result


def check_intervals(where: str, name: str, intervals: Tensor, queries: int, keys: int) -> None:
    """Raises unless intervals is int32 `[queries,2]` on the CPU with `0 <= lo <= hi <= keys` in every row."""
    if not isinstance(intervals, Tensor) or intervals.dtype != torch.int32:
        got = intervals.dtype if isinstance(intervals, Tensor) else type(intervals).__name__
        raise OfakernTypeError(f"{where}: {name} must be an int32 tensor, got {got}")
    if intervals.device.type != "cpu":
        raise OfakernValueError(
            f"{where}: {name} must be on the CPU, got {intervals.device}\nTry: build, then .to(device)"
        )
    if tuple(intervals.shape) != (queries, 2):
        raise OfakernValueError(f"{where}: {name} must have shape [Nq={queries},2], got {list(intervals.shape)}")
    lo, hi = intervals.numpy().T
    wrong = (lo < 0) | (hi > keys) | (lo > hi)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise OfakernValueError(
            f"{where}: {name}[{i}] must satisfy 0 <= lo <= hi <= Nk = {keys}, got {(int(lo[i]), int(hi[i]))}"
        )


def _pack(lo: np.ndarray, hi: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack([lo, hi], axis=1).astype(np.int32))

"""The tolerance rule of `tests/ops/rule.py` for `log_mel`, shared by its tests and its benchmark."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rule import assert_kept
from torch import Tensor

from ofakern.ops.log_mel import MelConvention, log_mel


def assert_right(got: Tensor, wave: Tensor, lengths: Sequence[int], convention: MelConvention) -> float:
    """Raises AssertionError unless `got` keeps the rule against the reference in float64; gives error over bound."""
    exact = log_mel(wave.double(), lengths, convention=convention, backend="reference")
    peer = log_mel(wave, lengths, convention=convention, backend="reference")
    return assert_kept("log_mel", got, exact, peer, _size(wave, lengths, convention, exact), torch.float32)


def _size(wave: Tensor, lengths: Sequence[int], c: MelConvention, exact: Tensor) -> Tensor:
    """What one result adds up, as the logarithm passes it on.

    A sum of terms x has a rounding of eps * sum |x|; a bin of the spectrum adds up the windowed frame, and the
    logarithm of a filter's sum m turns an error of m into one of it over m. Whisper's largest value reaches all rows.
    """
    parts = []
    for samples, count in zip(wave.double().split(list(lengths)), map(c.frames, lengths), strict=True):
        if count == 0:
            continue
        loudest = float(samples.abs().max()) * c.tables.window.abs().sum()
        plain = exact[sum(map(len, parts)) :][:count]
        level = _unlog(plain, c)
        bins = (level / c.tables.filters.sum(1).clamp(min=1e-30)).clamp(min=c.floor)
        spread = (2 * loudest / bins.sqrt()) if c.power == 2 else loudest / bins
        parts.append(plain.abs() + spread * (0.11 if c.log == "whisper" else 1.0))
    return torch.cat(parts) if parts else exact.abs()


def _unlog(x: Tensor, c: MelConvention) -> Tensor:
    return 10 ** (4 * x - 4) if c.log == "whisper" else x.exp()

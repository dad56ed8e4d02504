"""Learning rate as a function of how far the run is."""

from __future__ import annotations

import math

from ofakern.train.config import TrainConfig


def learning_rate(config: TrainConfig, progress: float, warmup: float) -> float:
    """The learning rate at `progress` in [0, 1]: linear warm-up over the share `warmup`, then the decay.

    Source: OFA's polynomial decay: (lr - end) (1 - (n - w) / (N - w)) ** power + end.
    """
    peak, end = config.learning_rate, config.end_learning_rate
    if progress < warmup:
        return peak * progress / warmup
    left = 1.0 if warmup >= 1 else max(0.0, (1.0 - progress) / (1.0 - warmup))
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        return end + (peak - end) * 0.5 * (1.0 - math.cos(math.pi * left))
    power = 1.0 if config.schedule == "linear" else config.power
    return end + (peak - end) * math.pow(left, power)


def warmup_share(config: TrainConfig, total_updates: int) -> float:
    """The share of the run that warms up."""
    if config.warmup_updates is None:
        return min(1.0, config.warmup_ratio)
    return min(1.0, config.warmup_updates / total_updates)

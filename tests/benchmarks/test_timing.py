"""How many rounds a group of contenders gets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import Budget, in_turn


class Clock:
    """Stands still but for the calls that are timed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        fake = SimpleNamespace(perf_counter=lambda: self.now, process_time=lambda: self.now)
        monkeypatch.setattr(timing, "time", fake)

    def rounds(self, budget: Budget, seconds: float) -> int:
        def call() -> torch.Tensor:
            self.now += seconds
            return torch.ones(1)

        samples, _ = in_turn({"call": call}, budget)
        return len(samples["call"])


def test_quick_calls_fill_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert clock.rounds(Budget(1.0, 5, 1000), 0.0625) == 17
    assert clock.rounds(Budget(60.0, 1, 4), 0.0625) == 4


def test_slow_calls_get_the_least_and_very_slow_ones_three(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert clock.rounds(Budget(10.0, 7, 200), 2.5) == 7
    assert clock.rounds(Budget(10.0, 7, 200), 5.0) == 5
    assert clock.rounds(Budget(10.0, 7, 200), 12.0) == 3

"""Time of contenders in turn: every round calls each of them once, so that drift of the machine hits all."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.core import Output

Call = Callable[[], Output]
_FEWEST = 3  # rounds, however long
_SHORTEST = 1e-3  # seconds of one sample: quicker calls are repeated within it


@dataclass(frozen=True)
class Budget:
    """How long a group of contenders is timed: at least `least` rounds, then until `seconds` or `most` rounds.

    Where rounds are so long that three of them take more than twice `seconds`, three are enough.
    """

    seconds: float
    least: int
    most: int


def clock() -> Callable[[], float]:
    """Wall time; with one thread the process's own CPU time, which other programs on the machine hardly touch."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def clock_name() -> str:
    return "cpu" if clock() is time.process_time else "wall"


QUICK = Budget(1.5, 3, 50)
FULL = Budget(10.0, 7, 200)


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 by nearest rank."""
    ordered = sorted(samples)
    return {f"p{p}": ordered[min(len(ordered) - 1, round(p / 100 * (len(ordered) - 1)))] for p in (20, 50, 80)}


def in_turn(calls: Mapping[str, Call], budget: Budget) -> tuple[dict[str, list[float]], dict[str, Output]]:
    """Seconds per call of each contender, and each one's last result. Untimed calls come first."""
    repeats = {name: _repeats(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    last: dict[str, Output] = {}
    now, end = clock(), time.perf_counter() + budget.seconds
    patience = end + budget.seconds
    with _without_gc():
        for done in range(budget.most):
            if time.perf_counter() > (end if done >= budget.least else patience if done >= _FEWEST else math.inf):
                break
            for name, call in calls.items():
                last.pop(name, None)
                start = now()
                for _ in range(repeats[name]):
                    result = call()
                samples[name].append((now() - start) / repeats[name])
                last[name] = result
    return samples, last


def _repeats(call: Call) -> int:
    """Warms up; a call that is slow even cold needs no second one to know that it is not repeated."""
    for _ in range(2):
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        if seconds > 10 * _SHORTEST:
            break
    return max(1, round(_SHORTEST / max(seconds, 1e-7)))


@contextmanager
def _without_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

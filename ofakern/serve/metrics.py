"""Counters, gauges and histograms as Prometheus's text format has them (version 0.0.4)."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

__all__ = ["CONTENT_TYPE", "Counter", "Gauge", "Histogram", "Registry"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Counter:
    """A sum that only grows, one for each value of its label (if it has one)."""

    kind = "counter"

    def __init__(self, name: str, about: str, label: str = "") -> None:
        self.name, self.about, self._label = name, about, label
        self._lock = threading.Lock()
        self._values: dict[str, float] = {} if label else {"": 0.0}

    def add(self, amount: float = 1.0, label: str = "") -> None:
        with self._lock:
            self._values[label] = self._values.get(label, 0.0) + amount

    def value(self, label: str = "") -> float:
        with self._lock:
            return self._values.get(label, 0.0)

    def lines(self) -> Iterator[str]:
        with self._lock:
            values = sorted(self._values.items())
        for label, value in values:
            shown = f'{{{self._label}="{label}"}}' if self._label else ""
            yield f"{self.name}{shown} {_number(value)}"


class Gauge:
    """A number that is asked for when it is shown."""

    kind = "gauge"

    def __init__(self, name: str, about: str, read: Callable[[], float]) -> None:
        self.name, self.about, self._read = name, about, read

    def lines(self) -> Iterator[str]:
        yield f"{self.name} {_number(self._read())}"


class Histogram:
    """How many observations were at most each bound, and their sum."""

    kind = "histogram"

    def __init__(self, name: str, about: str, bounds: Sequence[float] = SECONDS) -> None:
        self.name, self.about, self._bounds = name, about, tuple(bounds)
        self._lock = threading.Lock()
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def lines(self) -> Iterator[str]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        below = 0
        for bound, count in zip((*self._bounds, math.inf), counts, strict=True):
            below += count
            yield f'{self.name}_bucket{{le="{_number(bound)}"}} {below}'
        yield f"{self.name}_sum {_number(total)}"
        yield f"{self.name}_count {below}"


class Registry:
    """The metrics of one engine and the server in front of it."""

    def __init__(self) -> None:
        self._metrics: list[Counter | Gauge | Histogram] = []

    def counter(self, name: str, about: str, label: str = "") -> Counter:
        counter = Counter(name, about, label)
        self._metrics.append(counter)
        return counter

    def gauge(self, name: str, about: str, read: Callable[[], float]) -> Gauge:
        gauge = Gauge(name, about, read)
        self._metrics.append(gauge)
        return gauge

    def histogram(self, name: str, about: str, bounds: Sequence[float] = SECONDS) -> Histogram:
        histogram = Histogram(name, about, bounds)
        self._metrics.append(histogram)
        return histogram

    def text(self) -> str:
        """The page that Prometheus reads."""
        lines: list[str] = []
        for metric in self._metrics:
            lines += [f"# HELP {metric.name} {metric.about}", f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
        return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(value)

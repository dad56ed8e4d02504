"""A run that is cut off keeps what it has: its file is written after every phase, SIGTERM ends it as Ctrl-C does.

Results hold "complete": false until all that was asked for has run; the times of a phase are kept before its memory is
measured. A second signal ends the process at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Keep = Callable[[dict[str, Any]], None]


def keep_nothing(results: dict[str, Any]) -> None:
    """For runs without a file."""


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt, once. Signals are the main thread's: in another nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, before)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

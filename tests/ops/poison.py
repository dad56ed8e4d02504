"""Memory that does not begin as zeros: for tests that results are written whole and no scratch is believed."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
_M_PERTURB = -6  # of glibc's malloc.h
_BYTE = (
    0x3F  # of what is freed; what is allocated gets its complement. 0.7 and -6.0 as float32, much the same in 16 bits
)


def poisoned(call: Callable[[], Result]) -> Result:
    """`call()` while malloc fills what it gives and what it takes back.

    In a thread of its own, so that the scratch which the bindings keep per thread is allocated in there too. Under a
    sanitizer malloc is the sanitizer's, which fills memory of its own accord.
    """
    found: list[Result | BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_PERTURB, _BYTE)
    try:
        thread.start()
        thread.join()
    finally:
        libc.mallopt(_M_PERTURB, 0)
    (result,) = found
    if isinstance(result, BaseException):
        raise result
    return result

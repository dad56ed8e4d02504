"""The compiled modules, imported once. One that does not load leaves its reason here, for BackendError and `info`."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from ofakern.errors import BackendError

_BUILD = "Try: pip install . (it needs g++ only)"


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return import_module(name), None
    except ImportError as error:
        return None, f"the compiled module {name} does not import: {error}. {_BUILD}"


class _Missing:
    """Stands for a module that did not load: its functions raise the reason."""

    def __init__(self, reason: str | None) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> NoReturn:
        raise BackendError(f"{name}: backend 'cpu' cannot run this call: {self._reason}")


cpu, cpu_reason = _load("ofakern._cpu")
# For the ops' own calls: never None.
kernels: Any = _Missing(cpu_reason) if cpu is None else cpu

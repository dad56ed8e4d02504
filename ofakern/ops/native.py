"""The compiled modules, imported once. One that does not load leaves its reason here, for BackendError and `info`."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_BUILD = "Try: pip install . (it needs g++ only)"


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return import_module(name), None
    except ImportError as error:
        return None, f"the compiled module {name} does not import: {error}. {_BUILD}"


cpu, cpu_reason = _load("ofakern._cpu")

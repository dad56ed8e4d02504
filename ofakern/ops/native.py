"""The compiled modules, imported once. One that does not load leaves its reason here, for BackendError and `info`."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from ofakern.errors import BackendError
from ofakern.ops import gpu

_BUILD = "Try: pip install . (it needs g++ only)"


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return import_module(name), None
    except ImportError as error:
        return None, f"the compiled module {name} does not import: {error}. {_BUILD}"


class _Missing:
    """Stands for a module that did not load: its functions raise the reason."""

    def __init__(self, backend: str, reason: str | None) -> None:
        self._backend, self._reason = backend, reason

    def __getattr__(self, name: str) -> NoReturn:
        raise BackendError(f"{name}: backend {self._backend!r} cannot run this call: {self._reason}")


cpu, cpu_reason = _load("ofakern._cpu")
# For the ops' own calls: never None.
kernels: Any = _Missing("cpu", cpu_reason) if cpu is None else cpu


def _load_cuda() -> tuple[ModuleType | None, str | None]:
    reason = gpu.unavailable()
    if reason is not None:
        return None, reason
    module, reason = _load("ofakern._cuda")
    if module is not None and (reason := gpu.driver_refusal(module)) is not None:
        module = None
    return module, reason


cuda, cuda_reason = _load_cuda()
cuda_kernels: Any = _Missing("cuda", cuda_reason) if cuda is None else cuda
# The type of device whose tensors `cuda_kernels` takes. Tests that emulate a GPU put both in another's place.
cuda_device = "cuda"

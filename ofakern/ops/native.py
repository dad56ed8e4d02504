"""The compiled modules, imported once. One that does not load leaves its reason here, for BackendError and `info`."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

import torch

from ofakern.errors import BackendError

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
    """The CUDA kernels, where torch sees a GPU: nobody else waits for a module they cannot use."""
    if find_spec("ofakern._cuda") is None:
        return None, "this build has no CUDA kernels (no nvcc when it was installed). Try: pip install . with it"
    if torch.version.cuda is None:
        return None, "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return None, "torch sees no GPU here"
    return _load("ofakern._cuda")


cuda, cuda_reason = _load_cuda()
cuda_kernels: Any = _Missing("cuda", cuda_reason) if cuda is None else cuda
# The type of device whose tensors `cuda_kernels` takes. Tests that emulate a GPU put both in another's place.
cuda_device = "cuda"

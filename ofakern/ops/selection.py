"""Which backend runs a call of an op, and why another one would not: the part that all ops share."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

from ofakern.errors import BackendError, OfakernValueError, OfakernWarning
from ofakern.ops import dispatch, gpu, native

NAMES = ("cpu", "cuda", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Read once, as triton itself reads it when the kernels are imported.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_warned: set[str] = set()


def triton_unavailable() -> str | None:
    """Why no Triton kernel can run here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed (it arrives with CUDA torch)"
    if not TRITON_INTERPRETED and not torch.cuda.is_available():
        return "not yet run on a GPU, and torch sees none here (TRITON_INTERPRET=1 interprets it on CPU tensors)"
    return None


def triton_refusal(tensor: Tensor) -> str | None:
    """Why a Triton kernel cannot take tensors like this one, beyond its device's kind and dtypes; or None."""
    if TRITON_INTERPRETED:
        return "Triton's interpreter computes bfloat16 wrongly" if tensor.dtype == torch.bfloat16 else None
    if torch.cuda.get_device_capability(tensor.device) < (8, 0):
        name = torch.cuda.get_device_name(tensor.device)
        return f"takes GPUs of compute capability 8.0 and newer, got {name}"
    return None


def cuda_refusal(tensor: Tensor) -> str | None:
    """Why the CUDA C++ kernels cannot take tensors on this one's device, beyond their dtypes; or None."""
    if native.cuda is None or not tensor.is_cuda:  # emulated
        return None
    capability = torch.cuda.get_device_capability(tensor.device)
    return gpu.architecture_refusal(native.cuda.architectures, capability, torch.cuda.get_device_name(tensor.device))


class Backends:
    """The backends of one op whose compiled entry in `ofakern._cpu` is `entry`.

    `dtypes`: what its kernels take; everything else (float64 among them) is the reference's. `cuda`: its entry in
    `ofakern._cuda`, if it has a CUDA kernel. `triton`: it has a Triton kernel.
    """

    def __init__(
        self,
        op: str,
        entry: str,
        dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES,
        triton: bool = False,
        cuda: str | None = None,
    ) -> None:
        self.op = op
        self.dtypes = dtypes
        self._cuda = cuda
        # None: can be used. Fixed at import, so that choosing costs nothing and traces under torch.compile.
        self.unavailable: dict[str, str | None] = {
            "cpu": self._cpu_unavailable(entry),
            "cuda": f"not available yet: this version has no CUDA kernel for {op}"
            if cuda is None
            else self._cuda_unavailable(cuda),
            "triton": triton_unavailable()
            if triton
            else f"not available yet: this version has no Triton kernel for {op}",
            "reference": None,
        }

    def _cpu_unavailable(self, entry: str) -> str | None:
        if native.cpu is None:
            return native.cpu_reason
        if not hasattr(native.cpu, entry):
            return f"the compiled module ofakern._cpu was built without {self.op}"
        return None

    def _cuda_unavailable(self, entry: str) -> str | None:
        if native.cuda is None:
            return native.cuda_reason
        if not hasattr(native.cuda, entry):
            return f"the compiled module ofakern._cuda was built without {self.op}"
        return None

    def refusal(self, backend: str, tensor: Tensor, limit: str | None = None) -> str | None:
        """Why a backend cannot take a checked call, or None. `limit`: what no kernel can do of this call."""
        reason = self.unavailable[backend]
        device = self._device(backend)
        if backend == "cuda" and device == "cpu" and self._cuda is not None:
            reason = None  # emulated
        if reason is not None or backend == "reference":
            return reason
        if tensor.device.type != device:
            return f"takes {device.upper()} tensors, got {tensor.device}"
        if tensor.dtype not in self.dtypes:
            *names, last = (str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"takes {', '.join(names)}{' and ' if names else ''}{last}, got {tensor.dtype}"
        if backend == "triton" and (reason := triton_refusal(tensor)) is not None:
            return reason
        if backend == "cuda" and (reason := cuda_refusal(tensor)) is not None:
            return reason
        return limit

    def _device(self, backend: str) -> str:
        """The type of device whose tensors a backend takes."""
        if backend == "cuda":
            return native.cuda_device
        return "cpu" if backend == "cpu" or TRITON_INTERPRETED else "cuda"

    def automatic(self, tensor: Tensor) -> str:
        """The static table behind `auto`: no kernel has float64, so the reference is its backend everywhere.

        On a GPU it takes what `ofakern.ops.dispatch` names, else the reference, as on devices that no kernel knows.
        """
        if tensor.dtype == torch.float64:
            return "reference"
        if tensor.device.type == "cpu":
            return "cpu"
        return (dispatch.choice(self.op, tensor) if tensor.is_cuda else None) or "reference"

    def _warn_of_reference(self, tensor: Tensor) -> None:
        """Once per op: what runs is right, and kernels that may be faster are there to be named."""
        if self.op in _warned or tensor.device.type != "cuda" or torch.compiler.is_compiling():
            return
        ready = [name for name in ("cuda", "triton") if self.refusal(name, tensor) is None]
        if not ready:
            return
        _warned.add(self.op)
        names = " or ".join(f"backend={name!r}" for name in ready)
        warnings.warn(
            f"{self.op}: 'auto' takes the reference (plain torch) for this call on {tensor.device}: no kept result "
            f"shows a kernel of ours right and faster there\nTry: {names}; ofakern.explain gives all reasons.",
            OfakernWarning,
            stacklevel=4,
        )

    def select(self, backend: str, tensor: Tensor, limit: str | None = None) -> str:
        """The backend that runs the call. Raises BackendError with the reason when it cannot; takes no other one."""
        if backend != "auto" and backend not in self.unavailable:
            choices = ", ".join(repr(name) for name in ("auto", *self.unavailable))
            raise OfakernValueError(f"{self.op}: backend must be one of {choices}, got {backend!r}")
        chosen = self.automatic(tensor) if backend == "auto" else backend
        reason = self.refusal(chosen, tensor, limit)
        if reason is not None:
            named = f"backend {chosen!r}" + (" (chosen by 'auto')" if backend == "auto" else "")
            raise BackendError(
                f"{self.op}: {named} cannot run this call: {reason}\n"
                "Try: backend='reference' (plain torch); ofakern.explain gives all reasons."
            )
        if backend == "auto" and chosen == "reference" and tensor.dtype != torch.float64:
            self._warn_of_reference(tensor)
        return chosen

    def reasons(self, backend: str, tensor: Tensor, limit: str | None = None) -> tuple[str, dict[str, str | None]]:
        """What `ofakern.explain` prints: the backend asked for, and each one's reason against the call."""
        wanted = self.automatic(tensor) if backend == "auto" else backend
        return wanted, {name: self.refusal(name, tensor, limit) for name in self.unavailable}

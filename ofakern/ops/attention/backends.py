"""Which backend runs a call of `attention`, and why another one would not."""

from __future__ import annotations

import torch
from torch import Tensor

from ofakern.errors import BackendError, OfakernValueError
from ofakern.ops import native
from ofakern.ops.selection import TRITON_INTERPRETED, triton_refusal, triton_unavailable

NAMES = ("cpu", "cuda", "triton", "reference")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _cpu_unavailable() -> str | None:
    if native.cpu is None:
        return native.cpu_reason
    if not hasattr(native.cpu, "attention_forward"):
        return "the compiled module ofakern._cpu was built without attention"
    return None


# None: the backend can be used. Fixed at import, so that choosing costs nothing and traces under torch.compile.
UNAVAILABLE: dict[str, str | None] = {
    "cpu": _cpu_unavailable(),
    "cuda": "not available yet: this version has no CUDA kernel for attention",
    "triton": triton_unavailable(),
    "reference": None,
}


def refusal(backend: str, q: Tensor, v: Tensor, q_pos: Tensor | None) -> str | None:
    """The reason why a backend cannot take a (checked) call, or None when it can."""
    reason = UNAVAILABLE[backend]
    if reason is not None or backend == "reference":
        return reason
    device = "CPU" if backend == "cpu" or TRITON_INTERPRETED else "CUDA"
    if q.device.type != device.lower():
        return f"takes {device} tensors, got {q.device}"
    if q.dtype not in _KERNEL_DTYPES:
        return f"takes float32, bfloat16 and float16, got {q.dtype}"
    if backend == "triton" and (reason := triton_refusal(q)) is not None:
        return reason
    widths = {"K": q.shape[2], "V": v.shape[2]} | ({} if q_pos is None else {"P": q_pos.shape[2]})
    for letter, width in widths.items():
        if width % 8 or not 8 <= width <= 256:
            return f"takes widths that are multiples of 8 up to 256, got {letter} = {width}"
    return None


def automatic(q: Tensor) -> str:
    """The static table behind `auto`: no kernel has float64, so the reference is its backend everywhere."""
    if q.dtype == torch.float64:
        return "reference"
    return "cpu" if q.device.type == "cpu" else "cuda"


def select(backend: str, q: Tensor, v: Tensor, q_pos: Tensor | None) -> str:
    """The backend that runs the call. Raises BackendError with the reason when it cannot; never takes another one."""
    if backend != "auto" and backend not in NAMES:
        choices = ", ".join(repr(name) for name in ("auto", *NAMES))
        raise OfakernValueError(f"attention: backend must be one of {choices}, got {backend!r}")
    chosen = automatic(q) if backend == "auto" else backend
    reason = refusal(chosen, q, v, q_pos)
    if reason is not None:
        named = f"backend {chosen!r}" + (" (chosen by 'auto')" if backend == "auto" else "")
        raise BackendError(
            f"attention: {named} cannot run this call: {reason}\n"
            "Try: backend='reference' (plain torch, O(T^2) memory); ofakern.explain gives all reasons."
        )
    return chosen

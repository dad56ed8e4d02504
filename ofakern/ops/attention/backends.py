"""Which backend runs a call of `attention`: every op's table, and what the kernels' widths may be."""

from __future__ import annotations

import torch
from torch import Tensor

from ofakern.ops.attention import flash
from ofakern.ops.attention.kernel_cuda import MAX_WIDTH
from ofakern.ops.selection import Backends


class _AttentionBackends(Backends):
    """Every op's backends, and "flash"."""

    flash_device = "cuda"

    def __init__(self) -> None:
        super().__init__("attention", "attention_forward", triton=True, cuda="attention")
        self.unavailable["flash"] = flash.unavailable()

    def refusal(self, backend: str, tensor: Tensor, limit: str | None = None) -> str | None:
        if backend != "flash" or (reason := self.unavailable["flash"]) is not None:
            return super().refusal(backend, tensor, limit) if backend != "flash" else reason
        if tensor.device.type != self.flash_device:
            return f"takes {self.flash_device.upper()} tensors, got {tensor.device}"
        if tensor.dtype not in flash.DTYPES:
            return f"takes bfloat16 and float16, got {tensor.dtype}"
        return limit


BACKENDS = _AttentionBackends()


def limit(q: Tensor, v: Tensor, q_pos: Tensor | None) -> str | None:
    """What no kernel can do of a checked call, or None."""
    widths = {"K": q.shape[2], "V": v.shape[2]} | ({} if q_pos is None else {"P": q_pos.shape[2]})
    for letter, width in widths.items():
        if width % 8 or not 8 <= width <= 256:
            return f"takes widths that are multiples of 8 up to 256, got {letter} = {width}"
    return None


def cuda_limit(q: Tensor, v: Tensor, q_pos: Tensor | None) -> str | None:
    """What the CUDA C++ kernels cannot do of a checked call, or None."""
    if (reason := limit(q, v, q_pos)) is not None:
        return reason
    widest = max(q.shape[2], v.shape[2], 0 if q_pos is None else q_pos.shape[2])
    if widest > MAX_WIDTH:
        return f"takes widths up to {MAX_WIDTH}, got {widest}"
    return "takes bfloat16 and float16, got torch.float32" if q.dtype == torch.float32 else None

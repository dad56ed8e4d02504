"""The public door of `linear`: every argument is checked here. The other half: csrc/ops/linear/."""

from __future__ import annotations

import torch
from torch import Tensor

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.ops import native
from ofakern.ops.library import autocast
from ofakern.ops.linear import op
from ofakern.ops.linear.reference import linear_reference
from ofakern.ops.selection import Backends

_WHERE = "linear"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Rows from which the kernel is faster than torch's product for the weight's gradient, measured.
_FEWEST = 512


class _LinearBackends(Backends):
    def of_call(self, backend: str, x: Tensor, weight: Tensor) -> str:
        """`backend`, but for "auto" what runs: the kernel where AMX multiplies bfloat16 and there are rows enough."""
        if backend != "auto":
            return backend
        takes = (
            weight.requires_grad
            and x.dtype is torch.bfloat16
            and x.numel() >= _FEWEST * weight.shape[1]
            and x.device.type == "cpu"
            and torch.is_grad_enabled()
            and self.unavailable["cpu"] is None
            and _multiplies_bfloat16()
        )
        return "cpu" if takes else "reference"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _multiplies_bfloat16() -> bool:
    """Whether the CPU's kernels multiply bfloat16 as it is stored. torch.compile cannot trace the binding; a compiled
    graph keeps the answer."""
    return bool(native.kernels.isa() == "avx512_amx")


BACKENDS = _LinearBackends(_WHERE, "linear_backward")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """`x @ weight^T + bias` as torch computes it, with the gradient of weight and bias in one pass of our own.

    The products forward and for x's gradient are torch's. The weight's gradient sums over rows that both operands keep
    the wrong way round; the kernel turns them block by block in the caches (`csrc/core/weight_gradient.h`).

    Args:
        x: `[..., I]`; float32, bfloat16, float16 (float64: reference).
        weight: `[O, I]`, bias: `[O]` or None, in x's dtype. Under autocast all take its dtype, as for torch's own.
        backend: "auto" (the kernel for bfloat16 on a CPU with AMX, from 512 rows on and where weight needs a gradient;
            else torch's), "cpu" or "reference".

    Returns:
        `[..., O]` in x's dtype. x and weight are kept for the gradient, as by torch.

    Raises:
        OfakernTypeError, OfakernValueError: an argument of the wrong type, dtype, device or shape.
        BackendError: the backend cannot run the call, with the reason.
        OfakernRuntimeError: the weight's second derivative, or vmap (both work with backend="reference").
    """
    x, weight, bias = _check(x, weight, bias)
    if BACKENDS.select(BACKENDS.of_call(backend, x, weight), x) == "cpu":
        return op.linear(x, weight, bias)
    return linear_reference(x, weight, bias)


def refusals(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto"
) -> tuple[str, dict[str, str | None]]:
    """What `ofakern.explain` prints of a call of `linear`."""
    x, weight, _ = _check(x, weight, bias)
    return BACKENDS.reasons(BACKENDS.of_call(backend, x, weight), x)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    x = _float("x", x)
    weight = _like(x, "weight", weight)
    if weight.ndim != 2:
        raise OfakernValueError(f"{_WHERE}: weight must have shape [O, I], got {list(weight.shape)}")
    out, width = weight.shape
    if x.ndim < 1 or x.shape[-1] != width:
        raise OfakernValueError(f"{_WHERE}: x must have shape [..., I = {width}], got {list(x.shape)}")
    if bias is not None:
        bias = _like(x, "bias", bias)
        if bias.ndim != 1 or bias.shape[0] != out:
            raise OfakernValueError(f"{_WHERE}: bias must have shape [O = {out}], got {list(bias.shape)}")
    return x, weight, bias


def _like(x: Tensor, name: str, tensor: Tensor) -> Tensor:
    tensor = _float(name, tensor)
    if tensor.device != x.device:
        raise OfakernValueError(f"{_WHERE}: {name} must be on x's device ({x.device}), got {tensor.device}")
    if tensor.dtype != x.dtype:
        raise OfakernTypeError(f"{_WHERE}: {name} must have x's dtype ({x.dtype}), got {tensor.dtype}")
    return tensor


def _float(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise OfakernTypeError(f"{_WHERE}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        raise OfakernTypeError(f"{_WHERE}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    return autocast(tensor) if torch._C._is_any_autocast_enabled() else tensor

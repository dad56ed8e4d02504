"""The public door of the root-mean-square norm: every argument is checked here. The other half: csrc/ops/rms_norm/."""

from __future__ import annotations

import torch
from torch import Tensor

from ofakern.errors import OfakernError, OfakernTypeError, OfakernValueError
from ofakern.ops.library import STRAIGHT, straight
from ofakern.ops.rms_norm import op
from ofakern.ops.rms_norm.reference import rms_norm_reference
from ofakern.ops.selection import Backends

_WHERE = "rms_norm"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = Backends(_WHERE, "rms_norm_forward", triton=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension: T5's and LLaMA's norm, in one pass.

    Args:
        x: `[..., D]`; float32, bfloat16, float16 (float64 on the reference).
        weight: `[D]`; taken to float32 (float64 beside float64 x).
        backend: "auto", "cpu", "triton" or "reference" (plain torch). Never falls back.

    Returns:
        `[..., D]` in x's dtype, rounded once. For the gradient x and one float32 a row are kept.

    Raises:
        OfakernTypeError, OfakernValueError: an argument of the wrong type, dtype, device, shape or range.
        BackendError: the backend cannot run the call, with the reason.
        OfakernRuntimeError: a second derivative, or vmap (both work with backend="reference").

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """
    if straight(backend, x, weight) and x is not None and weight is not None and weight.dtype is torch.float32:
        try:
            return op.rms_norm(STRAIGHT, x, weight, eps)
        except OfakernError:
            pass  # refused: the checks below say why
    weight = _check(x, weight, eps)
    chosen = BACKENDS.select(backend, x)
    if chosen == "reference":
        return rms_norm_reference(x, weight, eps)
    return op.rms_norm(chosen, x, weight, float(eps))


def refusals(x: Tensor, weight: Tensor, eps: float = 1e-6, backend: str = "auto") -> tuple[str, dict[str, str | None]]:
    """What `ofakern.explain` prints of a call of `rms_norm`."""
    _check(x, weight, eps)
    return BACKENDS.reasons(backend, x)


def _check(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    for name, tensor in (("x", x), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise OfakernTypeError(f"{_WHERE}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOATS:
            raise OfakernTypeError(
                f"{_WHERE}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
    width = x.shape[-1] if x.ndim else 0
    if width < 1:
        raise OfakernValueError(f"{_WHERE}: x must have shape [..., D], D at least 1, got {list(x.shape)}")
    if weight.ndim != 1 or weight.shape[0] != width:
        raise OfakernValueError(f"{_WHERE}: weight must have shape [D = {width}], got {list(weight.shape)}")
    if weight.device != x.device:
        raise OfakernValueError(f"{_WHERE}: weight must be on x's device ({x.device}), got {weight.device}")
    # Written so that NaN fails.
    if not eps >= 0.0:
        raise OfakernValueError(f"{_WHERE}: eps must be at least 0, got {eps}")
    stat = torch.float64 if x.dtype == torch.float64 else torch.float32
    return weight if weight.dtype == stat else weight.to(stat)

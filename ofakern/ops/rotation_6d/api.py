"""The public doors of 6-D rotations: every argument is checked here. The other half: csrc/ops/rotation_6d/."""

from __future__ import annotations

import torch
from torch import Tensor

from ofakern.errors import OfakernError, OfakernTypeError, OfakernValueError
from ofakern.ops.library import STRAIGHT, straight
from ofakern.ops.rotation_6d import op
from ofakern.ops.rotation_6d.reference import rotation_6d_reference
from ofakern.ops.selection import Backends

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = Backends("rotation_6d", "rotation_6d_forward", cuda="rotation_6d")


def rotation_6d(x: Tensor, backend: str = "auto") -> Tensor:
    """Rotation matrices from their 6-D representation, by Gram-Schmidt.

    Args:
        x: `[..., 6]`, the first two columns of a matrix end to end, of any length and angle; float32, bfloat16,
            float16 (float64 on the reference).
        backend: "auto", "cpu", "cuda" or "reference" (plain torch). Never falls back.

    Returns:
        `[..., 3, 3]` in x's dtype: orthonormal columns b1, b2 and b1 x b2. Differentiable; where a column has no
        direction (length below 1e-12) the result is finite and no rotation.

    Raises:
        OfakernTypeError, OfakernValueError: x of the wrong type, dtype or shape.
        BackendError: the backend cannot run the call, with the reason.
        OfakernRuntimeError: a second derivative, or vmap (both work with backend="reference").

    Source: Zhou et al., On the Continuity of Rotation Representations in Neural Networks, arXiv 1812.07035.
    """
    if straight(backend, x):
        try:
            return op.rotation_6d(STRAIGHT, x)
        except OfakernError:
            pass  # refused: the checks below say why
    _check("x", x, (6,))
    backend = BACKENDS.select(backend, x)
    return rotation_6d_reference(x) if backend == "reference" else op.rotation_6d(backend, x)


def rotation_6d_of(matrix: Tensor) -> Tensor:
    """The 6-D representation `[..., 6]` of rotation matrices `[..., 3, 3]`: their first two columns, end to end.

    The inverse of `rotation_6d`. Nothing is computed, so this is torch's own copy and its gradient.
    """
    _check("matrix", matrix, (3, 3))
    return matrix[..., :2].transpose(-1, -2).flatten(-2)


def refusals(x: Tensor, backend: str = "auto") -> tuple[str, dict[str, str | None]]:
    """The backend that `rotation_6d(x, backend)` asks for, and each one's reason against the call (None: it can)."""
    _check("x", x, (6,))
    return BACKENDS.reasons(backend, x)


def _check(name: str, tensor: Tensor, last: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise OfakernTypeError(f"rotation_6d: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        raise OfakernTypeError(f"rotation_6d: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tuple(tensor.shape[-len(last) :]) != last:
        shape = ", ".join(map(str, last))
        raise OfakernValueError(f"rotation_6d: {name} must have shape [..., {shape}], got {list(tensor.shape)}")

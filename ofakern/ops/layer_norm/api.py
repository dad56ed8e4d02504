"""The public doors of the fused LayerNorms: every argument is checked here. The other half: csrc/ops/layer_norm/."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ofakern.errors import OfakernError, OfakernTypeError, OfakernValueError
from ofakern.ops.layer_norm import op, reference
from ofakern.ops.library import STRAIGHT, draw_seed, straight
from ofakern.ops.selection import Backends

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = {
    name: Backends(name, f"{name}_forward", triton=True)
    for name in ("add_layer_norm", "gelu_layer_norm", "head_scale_layer_norm", "embed_layer_norm")
}
_ADD, _GELU, _HEADS, _EMBED = BACKENDS.values()


def _is_ready(weight: Tensor, bias: Tensor, x: Tensor) -> bool:
    """Whether all are there and the kernels take weight as it is: refusing and casting one costs as much again as a
    small call."""
    return x is not None and bias is not None and getattr(weight, "dtype", None) is torch.float32


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream and normalises the sum in one pass.

    ::

        total = residual + dropout(x)
        out   = (total - mean(total)) / sqrt(var(total) + eps) * weight + bias

    Args:
        x, residual: `[..., D]` of one shape and dtype: float32, bfloat16, float16 (float64 on the reference). Under
            autocast they take the dtype that torch's addition would give them.
        weight, bias: `[D]`; taken to float32 (float64 beside float64 x).
        dropout_p: in [0, 1), of x. dropout_seed: int64 `[2]` (seed, offset); drawn from torch's default generator when
            None. Equal seeds give equal masks per (row, column) on every backend.
        backend: "auto", "cpu", "triton" or "reference" (plain torch). Never falls back.

    Returns:
        (out, total), `[..., D]` in x's dtype; `total` is the new residual stream. Both are differentiable.

    Raises:
        OfakernTypeError, OfakernValueError: an argument of the wrong type, dtype, device, shape or range.
        BackendError: the backend cannot run the call, with the reason.
        OfakernRuntimeError: a second derivative, or vmap (both work with backend="reference").

    Source: LayerNorm is Ba et al., arXiv 1607.06450; the pre-norm order Xiong et al., arXiv 2002.04745.
    """
    ready = _is_ready(weight, bias, x) and residual is not None
    if ready and straight(backend, x, residual, weight, bias, dropout_seed):
        try:
            seed = draw_seed(x.device) if dropout_seed is None and dropout_p else dropout_seed
            return op.add_layer_norm(STRAIGHT, x, residual, weight, bias, seed, eps, dropout_p)
        except OfakernError:
            pass  # refused: the checks below say why, or cast what can be cast
    x, residual, weight, bias, dropout_p, dropout_seed = _check_add(
        x, residual, weight, bias, eps, dropout_p, dropout_seed
    )
    backend = _ADD.select(backend, x)
    if backend == "reference":
        return reference.add_layer_norm_reference(x, residual, weight, bias, eps, dropout_p, dropout_seed)
    return op.add_layer_norm(backend, x, residual, weight, bias, dropout_seed, eps, dropout_p)


def gelu_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """LayerNorm of the exact GELU: `LN(x * Phi(x))`, OFA's and NormFormer's feed-forward norm.

    Args:
        x: `[..., D]`; float32, bfloat16, float16 (float64 on the reference).
        weight, bias: `[D]`; taken to float32 (float64 beside float64 x).
        backend: "auto", "cpu", "triton" or "reference" (plain torch). Never falls back.

    Returns:
        `[..., D]` in x's dtype. The GELU is recomputed for the gradient: only x is kept.

    Raises: as `add_layer_norm`. Source: Shleifer et al., NormFormer, arXiv 2110.09456.
    """
    if _is_ready(weight, bias, x) and straight(backend, x, weight, bias):
        try:
            return op.gelu_layer_norm(STRAIGHT, x, weight, bias, eps)
        except OfakernError:
            pass
    x, weight, bias = _check_gelu(x, weight, bias, eps)
    backend = _GELU.select(backend, x)
    if backend == "reference":
        return reference.gelu_layer_norm_reference(x, weight, bias, eps)
    return op.gelu_layer_norm(backend, x, weight, bias, eps)


def head_scale_layer_norm(
    x: Tensor, head_scale: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: str = "auto"
) -> Tensor:
    """Scales each attention head and normalises all heads together: NormFormer's head scale before a sub-LayerNorm.

    Args:
        x: `[N, H, K]`; float32, bfloat16, float16 (float64 on the reference).
        head_scale: `[H]`; weight, bias: `[H * K]`; taken to float32 (float64 beside float64 x).
        backend: "auto", "cpu", "triton" or "reference" (plain torch). Never falls back.

    Returns:
        `[N, H * K]` in x's dtype.

    Raises: as `add_layer_norm`. Source: Shleifer et al., NormFormer, arXiv 2110.09456.
    """
    ready = _is_ready(weight, bias, x) and head_scale is not None
    if ready and straight(backend, x, head_scale, weight, bias):
        try:
            return op.head_scale_layer_norm(STRAIGHT, x, head_scale, weight, bias, eps)
        except OfakernError:
            pass
    x, head_scale, weight, bias = _check_heads(x, head_scale, weight, bias, eps)
    backend = _HEADS.select(backend, x)
    if backend == "reference":
        return reference.head_scale_layer_norm_reference(x, head_scale, weight, bias, eps)
    return op.head_scale_layer_norm(backend, x, head_scale, weight, bias, eps)


def embed_layer_norm(
    tokens: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor,
    type_table: Tensor | None = None,
    types: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """`LN(scale * table[tokens] + type_table[types])`: token and type embedding, normalised, in one pass.

    Args:
        tokens: int64 `[...]`, each in [0, V). table: `[V, D]`; float32, bfloat16, float16 (float64 on the reference).
        weight, bias: `[D]`; taken to float32 (float64 beside a float64 table).
        type_table: `[T, D]` in table's dtype, or None. types: int64 like tokens; None reads row 0 (T must be 1).
        backend: "auto", "cpu", "triton" or "reference" (plain torch). Never falls back.

    Returns:
        `[..., D]` in table's dtype. The tables' gradients are dense; each entry is the sum over its tokens in order, so
        its bits do not depend on the number of threads.

    Raises: as `add_layer_norm`; a token or type out of range is an OfakernValueError on the CPU, NaN in Triton.
    """
    if _is_ready(weight, bias, table) and straight(backend, tokens, table, weight, bias, type_table, types):
        try:
            return op.embed_layer_norm(STRAIGHT, tokens, table, types, type_table, weight, bias, scale, eps)
        except OfakernError:
            pass
    weight, bias = _check_embed(tokens, table, weight, bias, type_table, types, scale, eps)
    backend = _EMBED.select(backend, table)
    if backend == "reference":
        return reference.embed_layer_norm_reference(tokens, table, weight, bias, type_table, types, scale, eps)
    return op.embed_layer_norm(backend, tokens, table, types, type_table, weight, bias, float(scale), eps)


def refusals(name: str) -> Callable[..., tuple[str, dict[str, str | None]]]:
    """For `ofakern.explain`: of the op `name`, the backend that a call asks for and each one's reason against it."""
    function, check = _DOORS[name]

    def explain(*args: object, **kwargs: object) -> tuple[str, dict[str, str | None]]:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        values: dict[str, Any] = dict(bound.arguments)
        backend = values.pop("backend")
        checked = check(**values)
        return BACKENDS[name].reasons(backend, values["table"] if name == "embed_layer_norm" else checked[0])

    return explain


def _check_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor | None]:
    where = "add_layer_norm"
    _check_float(where, "x", x)
    _check_float(where, "residual", residual)
    if x.dtype != residual.dtype:
        if not torch.is_autocast_enabled(x.device.type):
            raise OfakernTypeError(f"{where}: residual must have x's dtype ({x.dtype}), got {residual.dtype}")
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    if x.shape != residual.shape:
        raise OfakernValueError(f"{where}: residual must have x's shape {list(x.shape)}, got {list(residual.shape)}")
    if x.device != residual.device:
        raise OfakernValueError(f"{where}: residual must be on x's device ({x.device}), got {residual.device}")
    weight, bias = _check_affine(where, x, _width(where, x), weight, bias, eps)
    dropout_p = float(dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise OfakernValueError(f"{where}: dropout_p must be in [0, 1), got {dropout_p}")
    seed = None if dropout_p == 0.0 else _check_seed(where, x, dropout_seed)
    return x, residual, weight, bias, dropout_p, seed


def _check_gelu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check_float("gelu_layer_norm", "x", x)
    return x, *_check_affine("gelu_layer_norm", x, _width("gelu_layer_norm", x), weight, bias, eps)


def _check_heads(
    x: Tensor, head_scale: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    where = "head_scale_layer_norm"
    _check_float(where, "x", x)
    if x.ndim != 3 or x.shape[1] * x.shape[2] < 1:
        raise OfakernValueError(f"{where}: x must have shape [N, H, K] with H and K at least 1, got {list(x.shape)}")
    head_scale = _parameter(where, "head_scale", head_scale, x, "H", x.shape[1])
    return x, head_scale, *_check_affine(where, x, x.shape[1] * x.shape[2], weight, bias, eps)


def _check_embed(
    tokens: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor,
    type_table: Tensor | None,
    types: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    where = "embed_layer_norm"
    _check_index(where, "tokens", tokens, table)
    _check_table(where, "table", table, "V", table)
    if type_table is not None:
        _check_table(where, "type_table", type_table, "T", table)
        if type_table.dtype != table.dtype:
            raise OfakernTypeError(
                f"{where}: type_table must have table's dtype ({table.dtype}), got {type_table.dtype}"
            )
        if type_table.shape[1] != table.shape[1]:
            raise OfakernValueError(
                f"{where}: type_table must have table's width (D = {table.shape[1]}), got {list(type_table.shape)}"
            )
    if types is not None:
        _check_index(where, "types", types, table)
        if type_table is None:
            raise OfakernValueError(f"{where}: types must be None where type_table is None, got a tensor")
        if types.shape != tokens.shape:
            raise OfakernValueError(
                f"{where}: types must have tokens' shape {list(tokens.shape)}, got {list(types.shape)}"
            )
    elif type_table is not None and type_table.shape[0] != 1:
        raise OfakernValueError(
            f"{where}: type_table must have one row where types is None, got {list(type_table.shape)}"
        )
    if not -math.inf < scale < math.inf:  # not isfinite: this also traces with a symbolic scale
        raise OfakernValueError(f"{where}: scale must be finite, got {scale}")
    return _check_affine(where, table, table.shape[1], weight, bias, eps)


def _check_index(where: str, name: str, index: Tensor, table: Tensor) -> None:
    if not isinstance(index, Tensor):
        raise OfakernTypeError(f"{where}: {name} must be a tensor, got {type(index).__name__}")
    if index.dtype != torch.int64:
        raise OfakernTypeError(f"{where}: {name} must be int64, got {index.dtype}")
    if isinstance(table, Tensor) and index.device != table.device:
        raise OfakernValueError(f"{where}: {name} must be on table's device ({table.device}), got {index.device}")


def _check_table(where: str, name: str, table: Tensor, letter: str, like: Tensor) -> None:
    _check_float(where, name, table)
    if table.ndim != 2 or table.shape[1] < 1:
        raise OfakernValueError(f"{where}: {name} must have shape [{letter}, D], D at least 1, got {list(table.shape)}")
    if table.device != like.device:
        raise OfakernValueError(f"{where}: {name} must be on table's device ({like.device}), got {table.device}")


def _check_float(where: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise OfakernTypeError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        raise OfakernTypeError(f"{where}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def _width(where: str, x: Tensor) -> int:
    width = x.shape[-1] if x.ndim else 0
    if width < 1:
        raise OfakernValueError(f"{where}: x must have shape [..., D], D at least 1, got {list(x.shape)}")
    return width


def _check_affine(where: str, x: Tensor, width: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    # Written so that NaN fails.
    if not eps >= 0.0:
        raise OfakernValueError(f"{where}: eps must be at least 0, got {eps}")
    return _parameter(where, "weight", weight, x, "D", width), _parameter(where, "bias", bias, x, "D", width)


def _parameter(where: str, name: str, tensor: Tensor, x: Tensor, letter: str, size: int) -> Tensor:
    _check_float(where, name, tensor)
    if tensor.ndim != 1 or tensor.shape[0] != size:
        raise OfakernValueError(f"{where}: {name} must have shape [{letter} = {size}], got {list(tensor.shape)}")
    if tensor.device != x.device:
        raise OfakernValueError(f"{where}: {name} must be on the call's device ({x.device}), got {tensor.device}")
    stat = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tensor if tensor.dtype == stat else tensor.to(stat)


def _check_seed(where: str, x: Tensor, seed: Tensor | None) -> Tensor:
    if seed is None:
        return draw_seed(x.device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        got = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise OfakernTypeError(f"{where}: dropout_seed must be an int64 tensor, got {got}")
    if seed.device != x.device:
        raise OfakernValueError(f"{where}: dropout_seed must be on x's device ({x.device}), got {seed.device}")
    if tuple(seed.shape) != (2,):
        raise OfakernValueError(f"{where}: dropout_seed must have shape [2] (seed, offset), got {list(seed.shape)}")
    return seed


_DOORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "add_layer_norm": (add_layer_norm, _check_add),
    "gelu_layer_norm": (gelu_layer_norm, _check_gelu),
    "head_scale_layer_norm": (head_scale_layer_norm, _check_heads),
    "embed_layer_norm": (embed_layer_norm, _check_embed),
}

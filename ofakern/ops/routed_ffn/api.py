"""`routed_linear` and `routed_ffn`: check every argument and choose a backend."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ofakern.errors import OfakernError, OfakernTypeError, OfakernValueError
from ofakern.ops.layer_norm import gelu_layer_norm
from ofakern.ops.library import STRAIGHT, autocast, straight
from ofakern.ops.routed_ffn import op
from ofakern.ops.routed_ffn.backends import BACKENDS
from ofakern.ops.routed_ffn.reference import routed_linear_reference
from ofakern.ops.selection import NAMES

_WHERE = "routed_ffn"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def routed_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    counts: Sequence[int],
    source: Tensor | None = None,
    target: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`[N, K]` to `[N, O]`: the place p of expert e gives y[target[p]] = x[source[p]] @ weights[e]^T + biases[e].

    Args:
        x: `[N, K]`, float32, bfloat16, float16 (float64: reference).
        weights: E tensors `[O, K]` in x's dtype. biases: E of `[O]`, or none.
        counts: tokens of each expert; their places stand end to end and their sum is N.
        source, target: permutations int64 `[N]`, identity where None: grouping tokens by expert, and undoing it, is
            part of the products' packing and makes no copy of x or y.
        backend: "auto" (on a CPU the kernel for bfloat16 and float16, for float32 where experts have 4 to 96 tokens;
            else torch's products), "cpu", "triton" or "reference".

    Under autocast x, weights and biases take its dtype. Raises OfakernTypeError, OfakernValueError for an argument of
    the wrong type, dtype, device or shape; BackendError with the reason when the backend cannot run the call;
    OfakernRuntimeError for a second derivative or vmap (both work with backend="reference").
    """
    if straight(backend, x, *weights, *biases, source, target) and not torch._C._is_any_autocast_enabled():
        if x is not None and counts and _chosen(backend, x, counts) == "cpu":
            try:
                return op.routed_linear(STRAIGHT, x, weights, biases, counts, source, target)
            except OfakernError:
                pass  # refused: the checks below say why, or cast what can be cast
    call = _check(x, weights, biases, counts, source, target)
    chosen = BACKENDS.select(BACKENDS.of_counts(backend, call.x, call.counts), call.x)
    if chosen == "reference":
        return routed_linear_reference(*call)
    return op.routed_linear(chosen, *call)


def routed_ffn(
    x: Tensor,
    expert: Tensor,
    fc1: Sequence[Tensor],
    fc1_bias: Sequence[Tensor],
    fc2: Sequence[Tensor],
    fc2_bias: Sequence[Tensor],
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """A feed-forward layer whose two linear maps are those of each token's expert: `[N, D]` to `[N, D]`.

        y = fc2_e(LayerNorm(gelu(fc1_e(x))))          e = expert of the token; without ln_weight no LayerNorm

    expert: integers `[N]` on the CPU, in [0, E). fc1: E of `[F, D]`, fc2: E of `[D, F]`; ln_weight, ln_bias `[F]`,
    shared by the experts as in OFASys' modal feed-forward layers. Errors as `routed_linear`.
    """
    if expert.shape != x.shape[:1] or expert.dtype.is_floating_point:
        raise OfakernValueError(f"{_WHERE}: expert must be integers [N={x.shape[0]}], got {list(expert.shape)}")
    if expert.numel() and not 0 <= int(expert.min()) <= int(expert.max()) < len(fc1):
        raise OfakernValueError(
            f"{_WHERE}: expert must be in [0, E={len(fc1)}), got {int(expert.min())} to {int(expert.max())}"
        )
    counts = torch.bincount(expert, minlength=len(fc1)).tolist()
    order = None if max(counts) == x.shape[0] else torch.argsort(expert, stable=True).to(x.device)

    def activate(hidden: Tensor) -> Tensor:
        if ln_weight is None or ln_bias is None:
            return F.gelu(hidden)
        return gelu_layer_norm(hidden, ln_weight, ln_bias, eps, backend)

    if BACKENDS.select(BACKENDS.of_counts(backend, x, counts), x) != "reference":
        hidden = activate(routed_linear(x, fc1, fc1_bias, counts, order, None, backend))
        return routed_linear(hidden, fc2, fc2_bias, counts, None, order, backend)
    # torch's products, an expert at a time: the wide activations of all are never gathered into one tensor.
    parts = []
    for e, part in enumerate(torch.split(x if order is None else x.index_select(0, order), counts)):
        hidden = activate(routed_linear(part, fc1[e : e + 1], fc1_bias[e : e + 1], counts[e : e + 1], backend=backend))
        parts.append(routed_linear(hidden, fc2[e : e + 1], fc2_bias[e : e + 1], counts[e : e + 1], backend=backend))
    y = torch.cat(parts)
    return y if order is None else y.index_select(0, torch.argsort(order))


def refusals(*args: object, **kwargs: object) -> tuple[str, dict[str, str | None]]:
    """The backend that `routed_linear(*args, **kwargs)` asks for, and each one's reason against the call."""
    bound = _signature.bind(*args, **kwargs)
    bound.apply_defaults()
    values = dict(bound.arguments)
    backend = str(values.pop("backend"))
    call = _check(**values)
    x, wanted = call.x, _chosen(backend, call.x, call.counts)
    return wanted, {name: BACKENDS.refusal(name, x) for name in NAMES}


def _chosen(backend: str, x: Tensor, counts: Sequence[int]) -> str:
    named = BACKENDS.of_counts(backend, x, counts)
    return BACKENDS.automatic(x) if named == "auto" else named


class _Call(NamedTuple):
    """A checked call, casts done; in the order of `routed_linear`."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    counts: list[int]
    source: Tensor | None
    target: Tensor | None


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    counts: Sequence[int],
    source: Tensor | None,
    target: Tensor | None,
) -> _Call:
    _check_float("x", x, 2)
    x = autocast(x)
    experts = len(weights)
    if experts < 1:
        raise OfakernValueError(f"{_WHERE}: weights must name at least one expert, got none")
    _check_float("weights[0]", weights[0], 2)
    out = weights[0].shape[0]
    if len(biases) not in (0, experts):
        raise OfakernValueError(f"{_WHERE}: biases must be one per expert ({experts}) or none, got {len(biases)}")
    cast = [_like(x, f"weights[{e}]", weight, (out, x.shape[1])) for e, weight in enumerate(weights)]
    offsets = [_like(x, f"biases[{e}]", bias, (out,)) for e, bias in enumerate(biases)]
    if len(counts) != experts or sum(counts) != x.shape[0] or min(counts) < 0:
        raise OfakernValueError(
            f"{_WHERE}: counts must be {experts} numbers that add up to N={x.shape[0]}, got {list(counts)}"
        )
    for name, index in (("source", source), ("target", target)):
        if index is None:
            continue
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise OfakernTypeError(f"{_WHERE}: {name} must be an int64 tensor, got {got}")
        if tuple(index.shape) != (x.shape[0],) or index.device != x.device:
            raise OfakernValueError(
                f"{_WHERE}: {name} must be [N={x.shape[0]}] on {x.device}, got {list(index.shape)} on {index.device}"
            )
    return _Call(x, cast, offsets, list(counts), source, target)


def _check_float(name: str, tensor: Tensor, ndim: int) -> None:
    if not isinstance(tensor, Tensor):
        raise OfakernTypeError(f"{_WHERE}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        raise OfakernTypeError(f"{_WHERE}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.ndim != ndim:
        raise OfakernValueError(f"{_WHERE}: {name} must have {ndim} dimensions, got shape {list(tensor.shape)}")


def _like(x: Tensor, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    _check_float(name, tensor, len(shape))
    if tensor.device != x.device:
        raise OfakernValueError(f"{_WHERE}: {name} must be on x's device ({x.device}), got {tensor.device}")
    tensor = autocast(tensor)
    if tensor.dtype != x.dtype:
        raise OfakernTypeError(f"{_WHERE}: {name} must have x's dtype ({x.dtype}), got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise OfakernValueError(f"{_WHERE}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
    return tensor


_signature = inspect.signature(routed_linear)

"""`cross_entropy`: checks every argument and chooses a backend."""

from __future__ import annotations

import inspect
import logging
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ofakern.errors import OfakernError, OfakernTypeError, OfakernValueError
from ofakern.ops import log
from ofakern.ops.cross_entropy import op
from ofakern.ops.cross_entropy.backends import BACKENDS
from ofakern.ops.cross_entropy.reference import IGNORED, cross_entropy_reference
from ofakern.ops.library import STRAIGHT, autocast, straight
from ofakern.ops.selection import NAMES

_WHERE = "cross_entropy"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_logger = logging.getLogger("ofakern.ops")


class AllowedIds(Protocol):
    """CSR of allowed ids per row: offsets int64 `[N + 1]`, ids int64 `[nnz]`; an empty row allows everything."""

    @property
    def offsets(self) -> Tensor: ...
    @property
    def ids(self) -> Tensor: ...


class CrossEntropy(NamedTuple):
    """loss: smoothed, differentiable; nll: plain, detached; both f32 (f64 for f64 inputs), `[]` or per token `[N]`.
    tokens: int64 `[]`, how many are summed (have a label); best: int64 `[N]` where asked for."""

    loss: Tensor
    nll: Tensor
    tokens: Tensor
    best: Tensor | None


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = 0.0,
    allowed: AllowedIds | None = None,
    allowed_range: Tensor | tuple[int, int] | None = None,
    always_allowed: int = 0,
    subset: Tensor | None = None,
    drop_worst: float = 0.0,
    reduction: Literal["sum", "none"] = "sum",
    return_best: bool = False,
    backend: str = "auto",
) -> CrossEntropy:
    """Label-smoothed cross entropy of `hidden @ weight^T + bias`, whose logits are never held for all tokens.

        nll = logsumexp(s) - s[label]                 s: the logits of the A ids that a token allows
        loss = (1 - epsilon - e) * nll + e * sum of (logsumexp(s) - s),   e = epsilon / (A - 1), 0 where A = 1

    Args:
        hidden: `[N, D]`, float32, bfloat16, float16 (float64: reference); any strides.
        weight: `[V, D]` in hidden's dtype, e.g. the tied embeddings.
        labels: int64 `[N]`, an id or -100 (no loss, no gradient). One that is not allowed has the loss inf.
        bias: `[V]` in hidden's dtype.
        epsilon: label smoothing in [0, 1). torch's own smoothing e is the same function with e = epsilon * A / (A - 1).
        allowed: per token its own set of ids (a CSR table such as `PackedBatch.allowed`).
        allowed_range: int32 `[N, 2]`, or one (lo, hi) for all: ids of [lo, hi) are allowed, and those below
        always_allowed: (OFA allows its 4 special ids so).
        subset: int64 `[A]`, the only ids that exist in this call (a closed set of classes); labels stay ids of V.
        drop_worst: this part of the labelled tokens, those of the largest loss, is left out of all sums
            (int(n * (1 - drop_worst)) are kept); reduction="sum" only.
        reduction: "sum" or "none" (per token). Under "sum" without drop_worst the gradients are computed in the
            forward pass, which saves one of four products.
        return_best: the best allowed id of each token (the first one of equals), -100 where there is no label.
        backend: "auto", "cpu", "triton" or "reference".

    At most one of allowed, allowed_range and subset is given. Under autocast hidden, weight and bias take its dtype.
    Each gradient has its argument's dtype; weight's is rounded to it once per chunk of (at most 1024) tokens.

    Raises:
        OfakernTypeError, OfakernValueError: an argument of the wrong type, dtype, device, shape or range.
        BackendError: the backend cannot run the call, with the reason.
        OfakernRuntimeError: a second derivative, or vmap (both work with backend="reference").

    Source: OFA's adjust_label_smoothed_cross_entropy (arXiv 2202.03052), also OFASys's criterion.
    """
    if (
        reduction == "sum"
        and not drop_worst
        and subset is None
        and straight(backend, hidden, weight, labels, bias)
        and not (hidden is None or weight is None)
        and not torch._C._is_any_autocast_enabled()
    ):
        try:
            return _run_straight(
                hidden, weight, labels, bias, epsilon, allowed, allowed_range, always_allowed, return_best
            )
        except OfakernError:
            pass  # refused: the checks below say why, or cast what can be cast
    call = _check(
        hidden, weight, labels, bias, epsilon, allowed, allowed_range, always_allowed, subset, drop_worst, reduction
    )
    chosen = BACKENDS.select(backend, call.hidden)
    if log.ENABLED and not torch.compiler.is_compiling():
        log.once(_logger, _describe(call, chosen))
    if reduction == "sum" and not drop_worst and chosen != "reference":
        loss, nll, tokens, best = op.summed_loss(chosen, return_best, *call.inputs())
        return CrossEntropy(loss, nll, tokens, _ids(call, best, return_best))
    labelled = labels != IGNORED
    loss, nll, best = _per_token(call, chosen, return_best)
    if drop_worst:
        kept = int(int(labelled.sum()) * (1.0 - drop_worst))
        chosen_rows = loss.detach().masked_fill(~labelled, torch.inf).topk(kept, largest=False).indices
        loss, nll = loss[chosen_rows].sum(), nll[chosen_rows].sum()
        return CrossEntropy(loss, nll, torch.tensor(kept, device=labels.device), _ids(call, best, return_best))
    if reduction == "sum":
        loss, nll = loss.sum(), nll.sum()
    return CrossEntropy(loss, nll, labelled.sum(), _ids(call, best, return_best))


def refusals(*args: object, **kwargs: object) -> tuple[str, dict[str, str | None]]:
    """The backend that `cross_entropy(*args, **kwargs)` asks for, and each one's reason against the call."""
    bound = _signature.bind(*args, **kwargs)
    bound.apply_defaults()
    values = dict(bound.arguments)
    values.pop("return_best")
    backend = str(values.pop("backend"))
    call = _check(**values)
    wanted = BACKENDS.automatic(call.hidden) if backend == "auto" else backend
    return wanted, {name: BACKENDS.refusal(name, call.hidden) for name in NAMES}


def _run_straight(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    epsilon: float,
    allowed: AllowedIds | None,
    allowed_range: Tensor | tuple[int, int] | None,
    always_allowed: int,
    best: bool,
) -> CrossEntropy:
    """Raises OfakernError where the kernel cannot take the arguments as they are, or where they break a rule."""
    offsets, ids = (None, None) if allowed is None else (allowed.offsets, allowed.ids)
    limits = None if allowed_range is None else _range(hidden, allowed_range)
    inputs = (hidden, weight, bias, labels, offsets, ids, limits, always_allowed, epsilon)
    return CrossEntropy(*op.summed_loss(STRAIGHT, best, *inputs))


class _Call(NamedTuple):
    """A checked call: casts done, the subset's rows taken."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    offsets: Tensor | None
    ids: Tensor | None
    allowed_range: Tensor | None
    always_allowed: int
    epsilon: float
    subset: Tensor | None

    def inputs(self) -> tuple[object, ...]:
        """In the order of the registered ops."""
        return self[:-1]


def _per_token(call: _Call, backend: str, best: bool) -> tuple[Tensor, Tensor, Tensor]:
    if backend != "reference":
        return op.token_losses(*call.inputs(), best=best, backend=backend)
    loss, nll, ids = cross_entropy_reference(
        call.hidden,
        call.weight,
        call.labels,
        call.bias,
        call.epsilon,
        call.offsets,
        call.ids,
        call.allowed_range,
        call.always_allowed,
    )
    return loss, nll.detach(), ids


def _ids(call: _Call, best: Tensor | None, wanted: bool) -> Tensor | None:
    """Best ids counted in V."""
    if best is None or not wanted:
        return None
    if call.subset is None:
        return best
    return torch.where(best >= 0, call.subset[best.clamp(min=0)], best)


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    epsilon: float,
    allowed: AllowedIds | None,
    allowed_range: Tensor | tuple[int, int] | None,
    always_allowed: int,
    subset: Tensor | None,
    drop_worst: float,
    reduction: str,
) -> _Call:
    _check_float("hidden", hidden, 2)
    hidden = autocast(hidden)
    weight = _like(hidden, "weight", weight, (-1, hidden.shape[1]), "[V, D={}]")
    if weight.shape[0] < 1:
        raise OfakernValueError(f"{_WHERE}: V must be at least 1, got {weight.shape[0]}")
    if bias is not None:
        bias = _like(hidden, "bias", bias, (weight.shape[0],), "[V={}]")
    _check_ids(hidden, "labels", labels, (hidden.shape[0],), "[N={}]")
    if not 0.0 <= epsilon < 1.0:
        raise OfakernValueError(f"{_WHERE}: epsilon must be in [0, 1), got {epsilon}")
    if not 0.0 <= drop_worst < 1.0:
        raise OfakernValueError(f"{_WHERE}: drop_worst must be in [0, 1), got {drop_worst}")
    if reduction not in ("sum", "none"):
        raise OfakernValueError(f"{_WHERE}: reduction must be 'sum' or 'none', got {reduction!r}")
    if drop_worst and reduction != "sum":
        raise OfakernValueError(f"{_WHERE}: drop_worst must be 0 with reduction='none', got {drop_worst}")
    given = [
        n for n, x in (("allowed", allowed), ("allowed_range", allowed_range), ("subset", subset)) if x is not None
    ]
    if len(given) > 1:
        raise OfakernValueError(
            f"{_WHERE}: allowed, allowed_range, subset must be at most one, got {' and '.join(given)}"
        )
    if not isinstance(always_allowed, int) or always_allowed < 0:
        raise OfakernValueError(f"{_WHERE}: always_allowed must be an int of at least 0, got {always_allowed}")
    offsets = ids = None
    if allowed is not None:
        offsets, ids = allowed.offsets, allowed.ids
        _check_ids(hidden, "allowed.offsets", offsets, (hidden.shape[0] + 1,), "[N + 1={}]")
        _check_ids(hidden, "allowed.ids", ids, (-1,), "[nnz]")
    limits = None if allowed_range is None else _range(hidden, allowed_range)
    if subset is not None:
        _check_ids(hidden, "subset", subset, (-1,), "[A]")
        weight, bias, labels = _take(subset, weight, bias, labels)
    return _Call(hidden, weight, bias, labels, offsets, ids, limits, always_allowed, float(epsilon), subset)


def _take(subset: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The subset's rows, and labels counted in them."""
    place = torch.full((weight.shape[0],), -1, dtype=torch.int64, device=labels.device)
    place[subset] = torch.arange(subset.shape[0], device=labels.device)
    inside = torch.where(labels == IGNORED, IGNORED, place[labels.clamp(min=0)])
    if not torch.compiler.is_compiling():
        outside = (inside == -1).nonzero()
        if outside.numel():
            at = int(outside[0])
            raise OfakernValueError(f"{_WHERE}: labels must be in subset or -100, got {int(labels[at])} at {at}")
        if int((place >= 0).sum()) != subset.shape[0]:
            raise OfakernValueError(f"{_WHERE}: subset must hold every id once, got an id twice")
    return weight.index_select(0, subset), None if bias is None else bias.index_select(0, subset), inside


def _range(hidden: Tensor, limits: Tensor | tuple[int, int]) -> Tensor:
    if not isinstance(limits, Tensor):
        lo, hi = limits
        return torch.tensor([[lo, hi]], dtype=torch.int32, device=hidden.device)
    if limits.dtype != torch.int32:
        raise OfakernTypeError(f"{_WHERE}: allowed_range must be int32, got {limits.dtype}")
    if limits.device != hidden.device:
        raise OfakernValueError(f"{_WHERE}: allowed_range must be on {hidden.device}, got {limits.device}")
    if tuple(limits.shape) not in ((1, 2), (hidden.shape[0], 2)):
        raise OfakernValueError(
            f"{_WHERE}: allowed_range must be [N={hidden.shape[0]}, 2] or [1, 2], got {list(limits.shape)}"
        )
    return limits


def _check_float(name: str, tensor: Tensor, ndim: int) -> None:
    if not isinstance(tensor, Tensor):
        raise OfakernTypeError(f"{_WHERE}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        raise OfakernTypeError(f"{_WHERE}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.ndim != ndim:
        raise OfakernValueError(f"{_WHERE}: {name} must have {ndim} dimensions, got shape {list(tensor.shape)}")


def _like(hidden: Tensor, name: str, tensor: Tensor, shape: tuple[int, ...], template: str) -> Tensor:
    _check_float(name, tensor, len(shape))
    if tensor.device != hidden.device:
        raise OfakernValueError(f"{_WHERE}: {name} must be on hidden's device ({hidden.device}), got {tensor.device}")
    tensor = autocast(tensor)
    if tensor.dtype != hidden.dtype:
        raise OfakernTypeError(f"{_WHERE}: {name} must have hidden's dtype ({hidden.dtype}), got {tensor.dtype}")
    _check_shape(name, tensor, shape, template)
    return tensor


def _check_ids(hidden: Tensor, name: str, tensor: Tensor, shape: tuple[int, ...], template: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise OfakernTypeError(f"{_WHERE}: {name} must be an int64 tensor, got {got}")
    if tensor.device != hidden.device:
        raise OfakernValueError(f"{_WHERE}: {name} must be on hidden's device ({hidden.device}), got {tensor.device}")
    _check_shape(name, tensor, shape, template)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], template: str) -> None:
    fits = tensor.ndim == len(shape) and all(n in (-1, m) for n, m in zip(shape, tensor.shape, strict=True))
    if not fits:
        known = [n for n in shape if n >= 0]
        raise OfakernValueError(f"{_WHERE}: {name} must be {template.format(*known)}, got {list(tensor.shape)}")


def _describe(call: _Call, backend: str) -> str:
    dtype = str(call.hidden.dtype).removeprefix("torch.")
    shapes = f"hidden{list(call.hidden.shape)} weight{list(call.weight.shape)}"
    return f"cross_entropy {shapes} {dtype} {call.hidden.device} -> {backend}"


_signature = inspect.signature(cross_entropy)

"""The public door of `gathered_linear`: every argument is checked here, values of indices in the kernel."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ofakern.errors import OfakernError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.ops import log
from ofakern.ops.gathered_linear import op
from ofakern.ops.gathered_linear.reference import gathered_linear_reference
from ofakern.ops.library import STRAIGHT, straight

_WHERE = "gathered_linear"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_logger = logging.getLogger("ofakern.ops.gathered_linear")


def gathered_linear(
    hidden: Tensor, weight: Tensor, states: Tensor, first: Tensor, tokens: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of the tokens that each row's state allows; each weight row is read once for all rows of its state.

    Inference only. States and their tokens are a compressed sparse row table, as `TokenAutomaton.tables` has it.

    Args:
        hidden: `[R,D]` float32, bfloat16, float16 (float64: reference).
        weight: `[V,D]` in hidden's dtype.
        states: int32 or int64 `[R]`, each in [0, S).
        first: int32 `[S+1]`: state s allows tokens[first[s]:first[s+1]].
        tokens: int32 `[E]`, each in [0, V).
        backend: "auto", "cpu" or "reference".

    Returns:
        values `[n]` float32 (float64 for float64), one run per row in the order of its tokens, float32 sums;
        row_first int32 `[R+1]`, where each row's run begins; row_tokens int32 `[n]`.

    Raises:
        OfakernTypeError, OfakernValueError: an argument of the wrong type, dtype, shape or with an index out of range.
        OfakernRuntimeError: a gradient is needed (there is none), or vmap.
        BackendError: the backend cannot run the call.
    """
    found: tuple[Tensor, Tensor, Tensor]
    plain = straight(backend, hidden, weight, states, first, tokens)
    if plain and not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        try:
            found = op.FORWARD[STRAIGHT](hidden, weight, _narrowed(states), first, tokens)
            return found
        except OfakernError:
            pass  # refused: the checks below say why
    _check(hidden, weight, states, first, tokens)
    chosen = op.BACKENDS.select(backend, hidden)
    if log.ENABLED and not torch.compiler.is_compiling():
        log.once(_logger, f"{_WHERE} hidden{list(hidden.shape)} weight{list(weight.shape)} {hidden.dtype} -> {chosen}")
    if chosen == "reference":
        return gathered_linear_reference(hidden, weight, states, first, tokens)
    found = op.FORWARD[chosen](hidden, weight, _narrowed(states), first, tokens)
    return found


def refusals(
    hidden: Tensor, weight: Tensor, states: Tensor, first: Tensor, tokens: Tensor, backend: str = "auto"
) -> tuple[str, dict[str, str | None]]:
    """What `ofakern.explain` prints of a call of `gathered_linear`."""
    _check(hidden, weight, states, first, tokens)
    return op.BACKENDS.reasons(backend, hidden)


def _narrowed(states: Tensor) -> Tensor:
    return states.to(torch.int32) if states.dtype == torch.int64 else states


def _check(hidden: Tensor, weight: Tensor, states: Tensor, first: Tensor, tokens: Tensor) -> None:
    given = {"hidden": hidden, "weight": weight, "states": states, "first": first, "tokens": tokens}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise OfakernTypeError(f"{_WHERE}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != hidden.device:
            raise OfakernValueError(
                f"{_WHERE}: {name} must be on hidden's device ({hidden.device}), got {tensor.device}"
            )
    if hidden.dtype not in _FLOATS:
        raise OfakernTypeError(f"{_WHERE}: hidden must be float32, bfloat16, float16 or float64, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise OfakernTypeError(f"{_WHERE}: weight must have hidden's dtype ({hidden.dtype}), got {weight.dtype}")
    if hidden.ndim != 2:
        raise OfakernValueError(f"{_WHERE}: hidden must have shape [R,D], got {list(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise OfakernValueError(f"{_WHERE}: weight must have shape [V,D={hidden.shape[1]}], got {list(weight.shape)}")
    if states.dtype not in (torch.int32, torch.int64):
        raise OfakernTypeError(f"{_WHERE}: states must be int32 or int64, got {states.dtype}")
    if states.ndim != 1 or states.shape[0] != hidden.shape[0]:
        raise OfakernValueError(f"{_WHERE}: states must have shape [R={hidden.shape[0]}], got {list(states.shape)}")
    for name in ("first", "tokens"):
        if given[name].dtype != torch.int32:
            raise OfakernTypeError(f"{_WHERE}: {name} must be int32, got {given[name].dtype}")
        if given[name].ndim != 1:
            raise OfakernValueError(f"{_WHERE}: {name} must have one dimension, got {list(given[name].shape)}")
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        raise OfakernRuntimeError(
            f"{_WHERE}: hidden and weight must not need a gradient, got requires_grad=True\nTry: torch.no_grad()."
        )

"""The registered ops `ofakern::cross_entropy_fwd`, `cross_entropy_sum` and `cross_entropy_bwd`, and the autograd.

`token_losses` gives per-token losses whose backward computes the scores a second time (four products in all).
`summed_loss` knows that every token's gradient is the same number, so its forward computes the gradients of the sum
with the losses (three products) and its backward multiplies them by that number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofakern.ops import native
from ofakern.ops.library import (
    STRAIGHT,
    apply_function,
    define,
    differentiate_once,
    kernel_ready,
    ops_of,
    readable,
    refuse_vmap,
    suffix_of,
)

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? offsets, Tensor? ids, Tensor? allowed_range, "
    "int always_allowed, float epsilon"
)
_HIDDEN = 0
_TENSORS = 7  # how many of the inputs are tensors
_LOSSES = "Tensor loss, Tensor nll, Tensor lse, Tensor best"
_GRADIENTS = "Tensor dhidden, Tensor dweight, Tensor dbias"


def token_losses(*inputs: Any, best: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """loss (differentiable) and nll f32 `[N]`, best int64 `[N]` (`[0]` when not wanted) of `_INPUTS` in that order."""
    if _wants_gradient(inputs):
        loss, nll, _, ids = apply_function(_TokenLosses, backend, best, *inputs)
    else:
        loss, nll, _, ids = _FORWARD[backend](*inputs, best)
    return loss, nll, ids


def summed_loss(backend: str, best: bool, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The sums of loss and nll, f32 `[]`, how many tokens have a label, int64 `[]`, and best; the loss differentiates.

    best has no elements or is None where it is not wanted.
    """
    if not _wants_gradient(inputs):
        loss, nll, tokens, _, ids, *_ = _SUM[backend](*inputs, best, False, False, False)
        return loss, nll, tokens, ids
    if backend == STRAIGHT:
        loss, others = _apply_straight(best, inputs[3:], *inputs[:3])
        return loss, *others
    loss, nll, tokens, ids = apply_function(_SummedLoss, backend, best, *inputs)
    return loss, nll, tokens, ids


def _wants_gradient(inputs: tuple[Any, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    hidden, weight, bias = inputs[:3]
    return hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(backend: str, best: bool, *inputs: Any) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = _FORWARD[backend](*inputs, best)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        _, nll, lse, best = output
        ctx.mark_non_differentiable(nll, lse, best)
        ctx.save_for_backward(lse, *inputs[2 : 2 + _TENSORS])
        ctx.backend, ctx.numbers = inputs[0], inputs[2 + _TENSORS :]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * (2 + _TENSORS + len(ctx.numbers))
        lse, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:5]
        name = "cross_entropy_bwd" + suffix_of(ctx.backend)
        grads = differentiate_once(name, dloss, lse, *tensors, *ctx.numbers, *wanted)
        return _gradients(grads, wanted, len(ctx.numbers))

    vmap = staticmethod(refuse_vmap("cross_entropy"))


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, best: bool, *inputs: Any) -> tuple[Tensor, ...]:
        loss, nll, tokens, lse, ids, *grads = _SUM[backend](*inputs, best, *ctx.needs_input_grad[2:5])
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.numbers = backend, inputs[_TENSORS:]
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*grads)
        else:
            ctx.grads = grads
            ctx.save_for_backward(lse, *inputs[:_TENSORS])
        ctx.mark_non_differentiable(nll, tokens, ids)
        return loss, nll, tokens, ids

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * (2 + _TENSORS + len(ctx.numbers))
        wanted = ctx.needs_input_grad[2:5]
        if torch.compiler.is_compiling():
            grads = tuple(grad * dloss.to(grad.dtype) for grad in ctx.saved_tensors)
        else:
            grads = _scaled_gradients(ctx, ctx.backend, dloss, wanted)
        return _gradients(grads, wanted, len(ctx.numbers))

    vmap = staticmethod(refuse_vmap("cross_entropy"))


class _StraightLoss(torch.autograd.Function):
    """`_SummedLoss` where no transform runs: autograd is shown what has a gradient, and the loss alone of the results,
    which is half of its time."""

    @staticmethod
    def forward(
        ctx: Any, best: bool, rest: tuple[Any, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        inputs = hidden, weight, bias, *rest
        loss, nll, tokens, lse, ids, *ctx.grads = _sum_straight(*inputs, best, *ctx.needs_input_grad[2:])
        ctx.save_for_backward(lse, *inputs[:_TENSORS])
        ctx.numbers = inputs[_TENSORS:]
        return loss, (nll, tokens, ids)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        grads = _scaled_gradients(ctx, STRAIGHT, dloss, wanted)
        return None, None, *(grad if want else None for grad, want in zip(grads, wanted, strict=True))


# What apply_function calls, found once.
_apply_straight: Any = super(torch.autograd.Function, _StraightLoss).apply


def _scaled_gradients(ctx: Any, backend: str, dloss: Tensor, wanted: tuple[bool, ...]) -> Any:
    """Those of the sum times dloss. They are no saved tensors: the first backward hands them over, a second one, or
    one that is to be differentiated, computes them again."""
    if torch.is_grad_enabled() or ctx.grads is None:
        lse, *tensors = ctx.saved_tensors
        name = "cross_entropy_bwd" + suffix_of(backend)
        return differentiate_once(name, dloss.expand(lse.shape), lse, *tensors, *ctx.numbers, *wanted)
    grads, ctx.grads = tuple(ctx.grads), None
    if not readable(dloss) or float(dloss) != 1.0:
        for grad, want in zip(grads, wanted, strict=True):
            if want:
                grad.mul_(dloss)
    return grads


def _gradients(grads: tuple[Tensor, ...], wanted: tuple[bool, ...], numbers: int) -> tuple[Tensor | None, ...]:
    given = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return (None, None, *given, *[None] * (_TENSORS - 3 + numbers))


def _empty_losses(inputs: Any, best: bool) -> list[Tensor]:
    tokens, device = inputs[_HIDDEN].shape[0], inputs[_HIDDEN].device
    losses = [torch.empty(tokens, dtype=torch.float32, device=device) for _ in range(3)]
    return [*losses, torch.empty(tokens if best else 0, dtype=torch.int64, device=device)]


def _empty_gradients(inputs: Any, wanted: tuple[bool, ...]) -> list[Tensor]:
    """A gradient that is not wanted is a tensor without elements: a schema cannot return `Tensor?`."""
    return [
        torch.empty(x.shape if want and x is not None else 0, dtype=inputs[0].dtype, device=inputs[0].device)
        for x, want in zip(inputs[:3], wanted, strict=True)
    ]


def _forward_cpu(*arguments: Any) -> Any:
    *inputs, best = arguments
    return native.kernels.cross_entropy(*inputs, torch.get_num_threads(), best)


def _sum_straight(*arguments: Any) -> Any:
    return native.kernels.cross_entropy_sums(torch.get_num_threads(), *arguments)


def _sum_cpu(*arguments: Any) -> Any:
    """A schema cannot return None: what is not wanted is a tensor without elements."""
    dtypes = (torch.float32, torch.int64, *[arguments[_HIDDEN].dtype] * 3)
    loss, nll, tokens, *rest = _sum_straight(*arguments)
    given = (torch.empty(0, dtype=dtype) if x is None else x for x, dtype in zip(rest, dtypes, strict=True))
    return loss, nll, tokens, *given


def _backward_cpu(dloss: Tensor, lse: Tensor, *arguments: Any) -> Any:
    inputs, wanted = arguments[:-3], arguments[-3:]
    return native.kernels.cross_entropy_gradients(dloss, lse, *inputs, torch.get_num_threads(), *wanted)


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_empty_losses(arguments, arguments[-1]))


def _sum_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *_, lse, best = _empty_losses(arguments, arguments[-4])
    sums = (lse.new_empty(()), lse.new_empty(()), lse.new_empty((), dtype=torch.int64))
    grads = _empty_gradients(arguments, arguments[-3:])
    return (*sums, lse if any(arguments[-3:]) else lse.new_empty(0), best, *grads)


def _backward_fake(dloss: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_empty_gradients(arguments, arguments[-3:]))


def _triton(name: str) -> Any:
    """`kernel_triton.<name>`, imported by its first call: that takes a second, and CPU users may not have triton."""

    def call(*arguments: Any) -> Any:
        from ofakern.ops.cross_entropy import kernel_triton

        ready = (kernel_ready(x) if isinstance(x, Tensor) else x for x in arguments)
        return getattr(kernel_triton, name)(*ready)

    return call


_WANTED = "bool wants_hidden, bool wants_weight, bool wants_bias"
define(
    "cross_entropy_fwd",
    f"({_INPUTS}, bool best) -> ({_LOSSES})",
    cpu=_forward_cpu,
    fake=_forward_fake,
    triton=_triton("forward_triton"),
)
define(
    "cross_entropy_sum",
    f"({_INPUTS}, bool best, {_WANTED}) -> (Tensor loss, Tensor nll, Tensor tokens, Tensor lse, Tensor best, "
    f"{_GRADIENTS})",
    cpu=_sum_cpu,
    fake=_sum_fake,
    triton=_triton("sum_triton"),
)
define(
    "cross_entropy_bwd",
    f"(Tensor dloss, Tensor lse, {_INPUTS}, {_WANTED}) -> ({_GRADIENTS})",
    cpu=_backward_cpu,
    fake=_backward_fake,
    triton=_triton("backward_triton"),
)
_FORWARD = ops_of("cross_entropy_fwd")
_SUM = ops_of("cross_entropy_sum") | {STRAIGHT: _sum_straight}

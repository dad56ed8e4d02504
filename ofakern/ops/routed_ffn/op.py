"""The registered ops `ofakern::routed_linear_fwd` and `routed_linear_bwd`, and the autograd around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ofakern.ops import native
from ofakern.ops.library import (
    apply_function,
    define,
    differentiate_once,
    kernel_ready,
    ops_of,
    refuse_vmap,
    suffix_of,
)


def routed_linear(
    backend: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    counts: Sequence[int],
    source: Tensor | None,
    target: Tensor | None,
) -> Tensor:
    """`[N, O]` of checked arguments; differentiable in x, weights and biases."""
    if torch.is_grad_enabled():
        leaves = (x, *weights, *biases)
        for leaf in leaves:
            if leaf.requires_grad:
                y: Tensor = apply_function(_RoutedLinear, backend, list(counts), source, target, len(weights), *leaves)
                return y
    y = _FORWARD[backend](x, list(weights), list(biases), list(counts), source, target)
    return y


class _RoutedLinear(torch.autograd.Function):
    @staticmethod
    def forward(backend: str, counts: list[int], source: Any, target: Any, experts: int, *leaves: Tensor) -> Tensor:
        x, weights, biases = leaves[0], list(leaves[1 : 1 + experts]), list(leaves[1 + experts :])
        y: Tensor = _FORWARD[backend](x, weights, biases, counts, source, target)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.backend, ctx.counts, source, target, ctx.experts, *leaves = inputs
        ctx.biases = len(leaves) - 1 - ctx.experts
        ctx.save_for_backward(source, target, *leaves[: 1 + ctx.experts])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        source, target, x, *weights = ctx.saved_tensors
        wants_x, wants_rest = ctx.needs_input_grad[5], any(ctx.needs_input_grad[6:])
        name = "routed_linear_bwd" + suffix_of(ctx.backend)
        grads = differentiate_once(
            name, dy, x, weights, ctx.counts, source, target, wants_x, wants_rest, ctx.biases > 0
        )
        dx, *rest = grads
        rest = rest if wants_rest else [None] * (ctx.experts + ctx.biases)
        return None, None, None, None, None, dx if wants_x else None, *rest

    vmap = staticmethod(refuse_vmap("routed_ffn"))


def _forward_cpu(*inputs: Any) -> Any:
    return native.kernels.routed_linear(*inputs, torch.get_num_threads())


def _backward_cpu(dy: Tensor, x: Tensor, weights: list[Tensor], counts: list[int], *rest: Any) -> list[Tensor]:
    source, target, *wanted = rest
    no_biases: list[Tensor] = []
    inputs = (dy, x, weights, no_biases, counts, source, target, torch.get_num_threads())
    return list(native.kernels.routed_linear_gradients(*inputs, *wanted))


def _empty_gradients(
    x: Tensor, weights: list[Tensor], wants_x: bool, wants_weights: bool, with_bias: bool
) -> list[Tensor]:
    """dx, E dweights, E dbiases (with a bias); one that is not wanted is a tensor without elements."""
    dx = x.new_empty(x.shape if wants_x else 0)
    dweights = [w.new_empty(w.shape if wants_weights else 0) for w in weights]
    dbiases = [w.new_empty(w.shape[0] if wants_weights else 0) for w in weights] if with_bias else []
    return [dx, *dweights, *dbiases]


def _forward_fake(x: Tensor, weights: list[Tensor], *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], weights[0].shape[0]))


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    counts: list[int],
    source: Tensor | None,
    target: Tensor | None,
    wants_x: bool,
    wants_weights: bool,
    with_bias: bool,
) -> list[Tensor]:
    return _empty_gradients(x, weights, wants_x, wants_weights, with_bias)


def _triton(name: str) -> Any:
    """`kernel_triton.<name>`, imported by its first call: that takes a second, and CPU users may not have triton."""

    def ready(value: Any) -> Any:
        if isinstance(value, list):
            return [ready(item) for item in value]
        return kernel_ready(value) if isinstance(value, Tensor) else value

    def call(*arguments: Any) -> Any:
        from ofakern.ops.routed_ffn import kernel_triton

        return getattr(kernel_triton, name)(*(ready(argument) for argument in arguments))

    return call


define(
    "routed_linear_fwd",
    "(Tensor x, Tensor[] weights, Tensor[] biases, int[] counts, Tensor? source, Tensor? target) -> Tensor",
    cpu=_forward_cpu,
    fake=_forward_fake,
    triton=_triton("forward_triton"),
)
define(
    "routed_linear_bwd",
    "(Tensor dy, Tensor x, Tensor[] weights, int[] counts, Tensor? source, Tensor? target, "
    "bool wants_x, bool wants_weights, bool with_bias) -> Tensor[]",
    cpu=_backward_cpu,
    fake=_backward_fake,
    triton=_triton("backward_triton"),
)
_FORWARD = ops_of("routed_linear_fwd")

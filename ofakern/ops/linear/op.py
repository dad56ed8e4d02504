"""The registered op `ofakern::linear_bwd`, the gradient of weight and bias, and the autograd around it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ofakern.ops import native
from ofakern.ops.library import apply_function, define, differentiate_once, refuse_vmap


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[..., O]` of checked arguments; differentiable in all three."""
    if not (weight.requires_grad and torch.is_grad_enabled()):  # nothing here that torch does not do
        return F.linear(x, weight, bias)
    y: Tensor = apply_function(_Linear, x, weight, bias)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, _, wants_bias = ctx.needs_input_grad
        dx = dy.matmul(weight) if wants_x else None
        rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dweight, dbias = differentiate_once("linear_bwd", *rows, wants_bias)
        return dx, dweight, dbias if wants_bias else None

    vmap = staticmethod(refuse_vmap("linear"))


def _backward_cpu(dy: Tensor, x: Tensor, with_bias: bool) -> Any:
    return native.kernels.linear_gradients(dy, x, with_bias, torch.get_num_threads())


def _backward_fake(dy: Tensor, x: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty((dy.shape[1], x.shape[1])), x.new_empty(dy.shape[1] if with_bias else 0)


# Without a bias the second result is a tensor without elements: a schema cannot return None.
define(
    "linear_bwd",
    "(Tensor dy, Tensor x, bool with_bias) -> (Tensor dweight, Tensor dbias)",
    cpu=_backward_cpu,
    fake=_backward_fake,
)

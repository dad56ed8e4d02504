"""The registered ops `ofakern::rotation_6d_fwd` and `ofakern::rotation_6d_bwd`, and the autograd around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofakern.ops import native
from ofakern.ops.library import apply_function, define, differentiate_once, ops_of, refuse_vmap
from ofakern.ops.rotation_6d import kernel_cuda


def rotation_6d(backend: str, x: Tensor) -> Tensor:
    """`[..., 6]` to `[..., 3, 3]`."""
    if torch.is_grad_enabled() and x.requires_grad:
        return apply_function(_Rotation, backend, x)  # type: ignore[no-any-return]
    return _FORWARD[backend](x)  # type: ignore[no-any-return]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(backend: str, x: Tensor) -> Any:
        return _FORWARD[backend](x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[str, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        return None, differentiate_once("rotation_6d_bwd", dout, *ctx.saved_tensors)

    vmap = staticmethod(refuse_vmap("rotation_6d"))


def _forward_cpu(x: Tensor) -> Any:
    return native.kernels.rotation_6d(x, torch.get_num_threads())


def _backward_cpu(dout: Tensor, x: Tensor) -> Any:
    return native.kernels.rotation_6d_gradient(dout, x, torch.get_num_threads())


def _forward_fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 3, 3))


def _backward_fake(dout: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


define("rotation_6d_fwd", "(Tensor x) -> Tensor", cpu=_forward_cpu, cuda=kernel_cuda.forward, fake=_forward_fake)
_FORWARD = ops_of("rotation_6d_fwd")
define(
    "rotation_6d_bwd",
    "(Tensor dout, Tensor x) -> Tensor",
    cpu=_backward_cpu,
    cuda=kernel_cuda.backward,
    fake=_backward_fake,
)

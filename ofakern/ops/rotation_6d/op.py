"""The registered ops `ofakern::rotation_6d_fwd` and `ofakern::rotation_6d_bwd`, and the autograd around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofakern.ops import native
from ofakern.ops.library import apply_function, define, differentiate_once, kernel_ready, refuse_vmap


def rotation_6d(x: Tensor) -> Tensor:
    """`[..., 6]` to `[..., 3, 3]`."""
    if torch.is_grad_enabled() and x.requires_grad:
        return apply_function(_Rotation, x)  # type: ignore[no-any-return]
    return _FORWARD(x)  # type: ignore[no-any-return]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Any:
        return _FORWARD(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        return differentiate_once("rotation_6d_bwd", dout, *ctx.saved_tensors)

    vmap = staticmethod(refuse_vmap("rotation_6d"))


def _forward_cpu(x: Tensor) -> Tensor:
    module: Any = native.cpu
    out = torch.empty((*x.shape[:-1], 3, 3), dtype=x.dtype)
    module.rotation_6d_forward(out, kernel_ready(x), torch.get_num_threads())
    return out


def _backward_cpu(dout: Tensor, x: Tensor) -> Tensor:
    module: Any = native.cpu
    dx = torch.empty(x.shape, dtype=x.dtype)
    module.rotation_6d_backward(dx, kernel_ready(dout), kernel_ready(x), torch.get_num_threads())
    return dx


def _forward_fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 3, 3))


def _backward_fake(dout: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_FORWARD = define("rotation_6d_fwd", "(Tensor x) -> Tensor", cpu=_forward_cpu, fake=_forward_fake)
define("rotation_6d_bwd", "(Tensor dout, Tensor x) -> Tensor", cpu=_backward_cpu, fake=_backward_fake)

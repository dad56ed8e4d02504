"""The registered ops `ofakern::rms_norm_fwd` and `ofakern::rms_norm_bwd`, and the autograd around them."""

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
    refuse_vmap,
    suffix_of,
)


def rms_norm(backend: str, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`[..., D]` to `[..., D]`; weight arrives as float32."""
    out: Tensor
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out, _ = apply_function(_RmsNorm, backend, x, weight, eps)
    else:
        forward = _forward_alone if backend == STRAIGHT else _FORWARD[backend]
        out, _ = forward(x, weight, eps)
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(backend: str, *inputs: Any) -> Any:
        return _FORWARD[backend](*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[str, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        ctx.backend, x, weight, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1], weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        name = "rms_norm_bwd" + suffix_of(ctx.backend)
        return (None, *differentiate_once(name, dout, *ctx.saved_tensors), None)

    vmap = staticmethod(refuse_vmap("rms_norm"))


# Results and workspace are made by the bindings, with torch; a tensor that is not row-major is copied there.


def _forward_cpu(*inputs: Any) -> Any:
    return native.kernels.rms_norm(*inputs, torch.get_num_threads(), True)


def _forward_alone(*inputs: Any) -> Any:
    """Without what only a gradient reads."""
    return native.kernels.rms_norm(*inputs, torch.get_num_threads(), False)


def _backward_cpu(*inputs: Any) -> Any:
    return native.kernels.rms_norm_gradients(*inputs, torch.get_num_threads())


def _forward_triton(x: Tensor, weight: Tensor, eps: float) -> Any:
    # Imported by the first call: it takes a second, and CPU users may not have triton.
    from ofakern.ops.rms_norm import kernel_triton

    return kernel_triton.forward(kernel_ready(x), kernel_ready(weight), eps)


def _backward_triton(*tensors: Tensor) -> Any:
    from ofakern.ops.rms_norm import kernel_triton

    return kernel_triton.backward(*map(kernel_ready, tensors))


def _forward_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.numel() // x.shape[-1],), dtype=torch.float32)


def _backward_fake(dout: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


define(
    "rms_norm_fwd",
    "(Tensor x, Tensor weight, float eps) -> (Tensor out, Tensor rstd)",
    cpu=_forward_cpu,
    fake=_forward_fake,
    triton=_forward_triton,
)
define(
    "rms_norm_bwd",
    "(Tensor dout, Tensor x, Tensor rstd, Tensor weight) -> (Tensor dx, Tensor dweight)",
    cpu=_backward_cpu,
    fake=_backward_fake,
    triton=_backward_triton,
)
_FORWARD = ops_of("rms_norm_fwd")

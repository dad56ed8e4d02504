"""The registered ops of the fused LayerNorms and the autograd around them.

Arguments are checked in api.py and again by the binding; here they are only brought into the form that kernels take.
Weight, bias and head scale arrive as float32.
"""

from __future__ import annotations

from functools import partial
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

_F32 = torch.float32
_AFFINE = "Tensor weight, Tensor bias"
_EMBED = "Tensor tokens, Tensor table, Tensor? types, Tensor? type_table"


def add_layer_norm(
    backend: str,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    p: float,
) -> tuple[Tensor, Tensor]:
    """(out, total)."""
    arguments = (x, residual, weight, bias, seed, eps, p)
    if torch.is_grad_enabled() and (
        x.requires_grad or residual.requires_grad or weight.requires_grad or bias.requires_grad
    ):
        if backend == STRAIGHT:
            out, total = _apply_add((seed, eps, p), x, residual, weight, bias)
        else:
            out, total, _ = apply_function(_Add, backend, *arguments)
    else:
        out, total, _ = _forward_alone("add_layer_norm", backend)(*arguments)
    return out, total


def gelu_layer_norm(backend: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _normalise("gelu_layer_norm", backend, (x, weight, bias), eps)


def head_scale_layer_norm(
    backend: str, x: Tensor, head_scale: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    return _normalise("head_scale_layer_norm", backend, (x, head_scale, weight, bias), eps)


def _normalise(name: str, backend: str, differentiable: tuple[Tensor, ...], eps: float) -> Tensor:
    out: Tensor
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)):
        out, _ = _forward_alone(name, backend)(*differentiable, eps)
    elif backend == STRAIGHT:
        out = _apply_normalised(name, eps, *differentiable)
    else:
        out, _ = apply_function(_Normalised, name, backend, *differentiable, eps)
    return out


def embed_layer_norm(
    backend: str,
    tokens: Tensor,
    table: Tensor,
    types: Tensor | None,
    type_table: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: float,
    eps: float,
) -> Tensor:
    arguments = (tokens, table, types, type_table, weight, bias, scale, eps)
    differentiable = (table, weight, bias) if type_table is None else (table, type_table, weight, bias)
    out: Tensor
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable):
        out, _ = apply_function(_Embed, backend, *arguments)
    else:
        out, _ = _forward_alone("embed_layer_norm", backend)(*arguments)
    return out


# ---- autograd -------------------------------------------------------------------------------------------------------


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(backend: str, *inputs: Any) -> Any:
        return _FORWARD["add_layer_norm"][backend](*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.backend, _, _, weight, _, seed, _, ctx.p = inputs
        _, total, stats = output
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(total, stats, weight, seed)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return None, *_add_gradients(ctx, ctx.backend, dout, dtotal), None, None, None

    vmap = staticmethod(refuse_vmap("add_layer_norm"))


def _add_gradients(
    ctx: Any, backend: str, dout: Tensor | None, dtotal: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Of x, residual, weight and bias."""
    if dout is None and dtotal is None:
        return None, None, None, None
    total, stats, weight, seed = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(total)
    name = "add_layer_norm_bwd" + suffix_of(backend)
    dx, dresidual, dweight, dbias = differentiate_once(name, dout, dtotal, total, stats, weight, seed, ctx.p)
    return (dresidual if ctx.p == 0.0 else dx), dresidual, dweight, dbias


class _StraightAdd(torch.autograd.Function):
    """`_Add` where no transform runs: showing autograd only what has a gradient saves an eighth of a small call."""

    @staticmethod
    def forward(
        ctx: Any, rest: tuple[Any, ...], x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, total, stats = _add_forward(x, residual, weight, bias, *rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, stats, weight, rest[0])
        ctx.p = rest[2]
        return out, total

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_add_gradients(ctx, STRAIGHT, dout, dtotal)


class _Normalised(torch.autograd.Function):
    """gelu_layer_norm and head_scale_layer_norm: their gradient takes dout, what goes before the weight, and stats."""

    @staticmethod
    def forward(op: str, backend: str, *inputs: Any) -> Any:
        return _FORWARD[op][backend](*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.op, ctx.backend, *activations, weight, _, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*activations, output[1], weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = differentiate_once(f"{ctx.op}_bwd{suffix_of(ctx.backend)}", dout, *ctx.saved_tensors)
        return None, None, *grads, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, op: str, *inputs: Any) -> Any:
        return refuse_vmap(op)(info, in_dims, *inputs)


class _StraightNormalised(torch.autograd.Function):
    """`_Normalised` in the same way."""

    @staticmethod
    def forward(ctx: Any, op: str, eps: float, *leaves: Tensor) -> Tensor:
        out: Tensor
        out, stats = _FORWARD[op][STRAIGHT](*leaves, eps)
        *activations, weight, _ = leaves
        ctx.save_for_backward(*activations, stats, weight)
        ctx.op = op
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *differentiate_once(f"{ctx.op}_bwd", dout, *ctx.saved_tensors)


# What apply_function calls, found once.
_apply_add: Any = super(torch.autograd.Function, _StraightAdd).apply
_apply_normalised: Any = super(torch.autograd.Function, _StraightNormalised).apply


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(backend: str, *inputs: Any) -> Any:
        return _FORWARD["embed_layer_norm"][backend](*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.backend, tokens, table, types, type_table, weight, _, ctx.scale, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(tokens, table, types, type_table, output[1], weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        name = "embed_layer_norm_bwd" + suffix_of(ctx.backend)
        grads = differentiate_once(name, dout, *ctx.saved_tensors, ctx.scale)
        dtable, dtype_table, dweight, dbias = grads
        if ctx.saved_tensors[3] is None:
            dtype_table = None
        return None, None, dtable, None, dtype_table, dweight, dbias, None, None

    vmap = staticmethod(refuse_vmap("embed_layer_norm"))


# ---- CPU ------------------------------------------------------------------------------------------------------------


# Results and workspace are made by the bindings, with torch; a tensor that is not row-major is copied there.


# stats: whether the statistics, which only a gradient reads, are among the results (else None is).


def _add_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    p: float,
    stats: bool = True,
) -> Any:
    return native.kernels.add_layer_norm(x, residual, weight, bias, eps, seed, p, torch.get_num_threads(), stats)


def _add_backward(*inputs: Any) -> Any:
    dx, dresidual, *affine = native.kernels.add_layer_norm_gradients(*inputs, torch.get_num_threads())
    return dresidual.new_empty(0) if dx is None else dx, dresidual, *affine


def _gelu_forward(*inputs: Any, stats: bool = True) -> Any:
    return native.kernels.gelu_layer_norm(*inputs, torch.get_num_threads(), stats)


def _gelu_backward(*inputs: Any) -> Any:
    return native.kernels.gelu_layer_norm_gradients(*inputs, torch.get_num_threads())


def _head_forward(*inputs: Any, stats: bool = True) -> Any:
    return native.kernels.head_scale_layer_norm(*inputs, torch.get_num_threads(), stats)


def _head_backward(*inputs: Any) -> Any:
    return native.kernels.head_scale_layer_norm_gradients(*inputs, torch.get_num_threads())


def _embed_forward(*inputs: Any, stats: bool = True) -> Any:
    *embedding, weight, bias, scale, eps = inputs
    return native.kernels.embed_layer_norm(*embedding, scale, weight, bias, eps, torch.get_num_threads(), stats)


def _embed_backward(*inputs: Any) -> Any:
    dout, *embedding, stats, weight, scale = inputs
    arguments = (dout, *embedding, scale, stats, weight, torch.get_num_threads())
    dtable, dtype_table, *affine = native.kernels.embed_layer_norm_gradients(*arguments)
    return dtable, dtable.new_empty(0) if dtype_table is None else dtype_table, *affine


# ---- shapes without data --------------------------------------------------------------------------------------------


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


def _stats(like: Tensor, rows: Any) -> Tensor:
    return like.new_empty((rows, 2), dtype=_F32)


def _add_forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(x), _stats(x, x.numel() // x.shape[-1])


def _add_backward_fake(
    dout: Tensor, dtotal: Tensor | None, total: Tensor, stats: Tensor, weight: Tensor, seed: Tensor | None, p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return total.new_empty(0) if p == 0.0 else _like(total), _like(total), _like(weight), _like(weight)


def _gelu_forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _like(x), _stats(x, x.numel() // x.shape[-1])


def _gelu_backward_fake(dout: Tensor, x: Tensor, stats: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(weight), _like(weight)


def _head_forward_fake(x: Tensor, head_scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], x.shape[1] * x.shape[2])), _stats(x, x.shape[0])


def _head_backward_fake(
    dout: Tensor, x: Tensor, head_scale: Tensor, stats: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(x), _like(head_scale), _like(weight), _like(weight)


def _embed_forward_fake(tokens: Tensor, table: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return table.new_empty((*tokens.shape, table.shape[1])), _stats(table, tokens.numel())


def _embed_backward_fake(
    dout: Tensor,
    tokens: Tensor,
    table: Tensor,
    types: Tensor | None,
    type_table: Tensor | None,
    stats: Tensor,
    weight: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype_table = table.new_empty(0) if type_table is None else _like(type_table)
    return _like(table), dtype_table, _like(weight), _like(weight)


# ---- Triton ---------------------------------------------------------------------------------------------------------


def _triton(name: str) -> Any:
    """`kernel_triton.<name>`, imported by its first call: that takes a second, and CPU users may not have triton."""

    def call(*arguments: Any) -> Any:
        from ofakern.ops.layer_norm import kernel_triton

        ready = (kernel_ready(a) if isinstance(a, Tensor) else a for a in arguments)
        return getattr(kernel_triton, name)(*ready)

    return call


define(
    "add_layer_norm_fwd",
    f"(Tensor x, Tensor residual, {_AFFINE}, Tensor? dropout_seed, float eps, float dropout_p) -> "
    "(Tensor out, Tensor total, Tensor stats)",
    cpu=_add_forward,
    fake=_add_forward_fake,
    triton=_triton("add_forward"),
)
define(
    "add_layer_norm_bwd",
    "(Tensor dout, Tensor? dtotal, Tensor total, Tensor stats, Tensor weight, Tensor? dropout_seed, float dropout_p)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    cpu=_add_backward,
    fake=_add_backward_fake,
    triton=_triton("add_backward"),
)
define(
    "gelu_layer_norm_fwd",
    f"(Tensor x, {_AFFINE}, float eps) -> (Tensor out, Tensor stats)",
    cpu=_gelu_forward,
    fake=_gelu_forward_fake,
    triton=_triton("gelu_forward"),
)
define(
    "gelu_layer_norm_bwd",
    "(Tensor dout, Tensor x, Tensor stats, Tensor weight) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    cpu=_gelu_backward,
    fake=_gelu_backward_fake,
    triton=_triton("gelu_backward"),
)
define(
    "head_scale_layer_norm_fwd",
    f"(Tensor x, Tensor head_scale, {_AFFINE}, float eps) -> (Tensor out, Tensor stats)",
    cpu=_head_forward,
    fake=_head_forward_fake,
    triton=_triton("head_forward"),
)
define(
    "head_scale_layer_norm_bwd",
    "(Tensor dout, Tensor x, Tensor head_scale, Tensor stats, Tensor weight) -> "
    "(Tensor dx, Tensor dhead_scale, Tensor dweight, Tensor dbias)",
    cpu=_head_backward,
    fake=_head_backward_fake,
    triton=_triton("head_backward"),
)
define(
    "embed_layer_norm_fwd",
    f"({_EMBED}, {_AFFINE}, float scale, float eps) -> (Tensor out, Tensor stats)",
    cpu=_embed_forward,
    fake=_embed_forward_fake,
    triton=_triton("embed_forward"),
)
define(
    "embed_layer_norm_bwd",
    f"(Tensor dout, {_EMBED}, Tensor stats, Tensor weight, float scale) -> "
    "(Tensor dtable, Tensor dtype_table, Tensor dweight, Tensor dbias)",
    cpu=_embed_backward,
    fake=_embed_backward_fake,
    triton=_triton("embed_backward"),
)
_FORWARD = {
    op: ops_of(f"{op}_fwd") for op in ("add_layer_norm", "gelu_layer_norm", "head_scale_layer_norm", "embed_layer_norm")
}
_ALONE = {
    "add_layer_norm": partial(_add_forward, stats=False),
    "gelu_layer_norm": partial(_gelu_forward, stats=False),
    "head_scale_layer_norm": partial(_head_forward, stats=False),
    "embed_layer_norm": partial(_embed_forward, stats=False),
}


def _forward_alone(op: str, backend: str) -> Any:
    """What gives the results of `op` where no gradient follows."""
    return _ALONE[op] if backend == STRAIGHT else _FORWARD[op][backend]

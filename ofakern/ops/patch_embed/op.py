"""The registered ops `ofakern::patch_embed_fwd` and `ofakern::patch_embed_bwd`, and the autograd around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ofakern.errors import BackendError
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
from ofakern.ops.selection import Backends

BACKENDS = Backends("patch_embed", "patch_embed_forward", triton=True)

_INPUTS = (
    "Tensor[] images, Tensor weight, float[] scale, float[] shift, Tensor? bias, Tensor? type_embedding, "
    "Tensor? position, Tensor? position_index, Tensor? ln_weight, Tensor? ln_bias, float eps"
)


def run(
    backend: str,
    images: Sequence[Tensor],
    weight: Tensor,
    scale: Sequence[float],
    shift: Sequence[float],
    bias: Tensor | None,
    type_embedding: Tensor | None,
    position: Tensor | None,
    position_index: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Tokens `[N,D]` of checked arguments; differentiable in all floating-point ones but the images."""
    parameters = (weight, bias, type_embedding, position, ln_weight, ln_bias)
    result: Tensor
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters):
        result = apply_function(_PatchEmbed, backend, scale, shift, eps, position_index, *parameters, *images)
    else:
        result = _FORWARD[backend](
            list(images), weight, scale, shift, bias, type_embedding, position, position_index, ln_weight, ln_bias, eps
        )
    return result


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(
        backend: str,
        scale: Sequence[float],
        shift: Sequence[float],
        eps: float,
        position_index: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        type_embedding: Tensor | None,
        position: Tensor | None,
        ln_weight: Tensor | None,
        ln_bias: Tensor | None,
        *images: Tensor,
    ) -> Tensor:
        out: Tensor = _FORWARD[backend](
            list(images), weight, scale, shift, bias, type_embedding, position, position_index, ln_weight, ln_bias, eps
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.backend, ctx.scale, ctx.shift, ctx.eps, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        position_index, weight, bias, type_embedding, position, ln_weight, ln_bias, *images = ctx.saved_tensors
        dweight, dbias, dposition, dln_weight, dln_bias = differentiate_once(
            "patch_embed_bwd" + suffix_of(ctx.backend),
            *(dout, images, weight, ctx.scale, ctx.shift, bias, type_embedding, position, position_index),
            *(ln_weight, ln_bias, ctx.eps),
        )
        return (
            *(None, None, None, None, None, dweight),
            dbias if bias is not None else None,
            dbias if type_embedding is not None else None,
            dposition if position is not None else None,
            dln_weight if ln_weight is not None else None,
            dln_bias if ln_bias is not None else None,
            *(None for _ in images),
        )

    vmap = staticmethod(refuse_vmap("patch_embed"))


def _module() -> Any:
    reason = BACKENDS.unavailable["cpu"]
    if reason is not None:
        raise BackendError(f"patch_embed: backend 'cpu' cannot run this call: {reason}")
    return native.cpu


def _arguments(images: Sequence[Tensor], weight: Tensor, scale: Any, shift: Any, *rest: Any) -> list[Any]:
    *tensors, eps = rest
    normalise = torch.tensor([list(scale), list(shift)], dtype=torch.float64)
    ready = [None if tensor is None else kernel_ready(tensor) for tensor in tensors]
    return [_rows_of_pixels(images), kernel_ready(weight), normalise, *ready, eps, torch.get_num_threads()]


def _rows_of_pixels(images: Sequence[Tensor]) -> list[Tensor]:
    """The kernel reads planar images or interleaved ones, all of a call alike."""
    views = [image.resolve_neg() for image in images]
    planar = all(x.stride(4) == 1 for x in views)
    interleaved = all(x.stride(2) == 1 and x.stride(4) == x.shape[2] for x in views)
    return views if planar or (interleaved and views[0].stride(4) != 1) else [x.contiguous() for x in views]


def _forward_cpu(images: Sequence[Tensor], weight: Tensor, *rest: Any) -> Tensor:
    module = _module()
    arguments = _arguments(images, weight, *rest)
    out = torch.empty((_tokens(images, weight), weight.shape[0]), dtype=weight.dtype)
    workspace = torch.empty(module.patch_embed_forward_workspace(*arguments), dtype=torch.uint8)
    module.patch_embed_forward(out, workspace, *arguments)
    return out


def _backward_cpu(dout: Tensor, images: Sequence[Tensor], weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    module = _module()
    arguments = _arguments(images, weight, *rest)
    *_, position, _, ln_weight, ln_bias, _ = rest
    dweight, dbias = torch.empty(weight.shape, dtype=weight.dtype), torch.empty(weight.shape[0])
    optional = [None if x is None else torch.empty(x.shape, dtype=x.dtype) for x in (position, ln_weight, ln_bias)]
    workspace = torch.empty(module.patch_embed_backward_workspace(*arguments), dtype=torch.uint8)
    module.patch_embed_backward(dweight, dbias, *optional, workspace, kernel_ready(dout), *arguments)
    return dweight, dbias, *(torch.empty(0) if x is None else x for x in optional)


def _tokens(images: Sequence[Tensor], weight: Tensor) -> int:
    kt, ph, pw = weight.shape[2:]
    return sum(x.shape[0] * (x.shape[1] // kt) * (x.shape[3] // ph) * (x.shape[4] // pw) for x in images)


def _forward_triton(images: Sequence[Tensor], *rest: Any) -> Tensor:
    # Imported by the first call: that takes a second, and CPU users may not have triton.
    from ofakern.ops.patch_embed import kernel_triton

    return kernel_triton.forward_triton(_rows_of_pixels(images), *_ready(rest))


def _backward_triton(dout: Tensor, images: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    from ofakern.ops.patch_embed import kernel_triton

    return kernel_triton.backward_triton(kernel_ready(dout), _rows_of_pixels(images), *_ready(rest))


def _ready(values: Sequence[Any]) -> list[Any]:
    return [kernel_ready(x) if isinstance(x, Tensor) else x for x in values]


def _forward_fake(images: Sequence[Tensor], weight: Tensor, *rest: Any) -> Tensor:
    return weight.new_empty((_tokens(images, weight), weight.shape[0]))


def _backward_fake(dout: Tensor, images: Sequence[Tensor], weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, position, _, ln_weight, ln_bias, _ = rest
    absent = torch.empty(0, device=weight.device)
    optional = (absent.clone() if x is None else x.new_empty(x.shape) for x in (position, ln_weight, ln_bias))
    return weight.new_empty(weight.shape), absent.new_empty(weight.shape[0]), *optional


define(
    "patch_embed_fwd",
    f"({_INPUTS}) -> Tensor",
    cpu=_forward_cpu,
    fake=_forward_fake,
    triton=_forward_triton,
)
# An absent input's gradient is a tensor without elements: a schema cannot return `Tensor?`.
define(
    "patch_embed_bwd",
    f"(Tensor dout, {_INPUTS}) -> (Tensor dweight, Tensor dbias, Tensor dposition, Tensor dln_weight, Tensor dln_bias)",
    cpu=_backward_cpu,
    fake=_backward_fake,
    triton=_backward_triton,
)
_FORWARD = ops_of("patch_embed_fwd")

"""The registered ops `ofakern::patch_embed_fwd` and `ofakern::patch_embed_bwd`, and the autograd around them."""

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
from ofakern.ops.patch_embed import kernel_cuda
from ofakern.ops.selection import Backends


class _PatchEmbedBackends(Backends):
    def refusal(self, backend: str, tensor: Tensor, limit: str | None = None) -> str | None:
        """As for every op; `tensor` is the weight, whose widths the CUDA kernels limit."""
        own = kernel_cuda.limit(tensor) if backend == "cuda" and limit is None else limit
        return super().refusal(backend, tensor, own)


BACKENDS = _PatchEmbedBackends("patch_embed", "patch_embed_forward", triton=True, cuda="patch_embed")

# images: each `layout`, or with the count of images before it; weight: of a Conv2d or Conv3d.
_INPUTS = (
    "str layout, Tensor[] images, Tensor weight, float[] scale, float[] shift, Tensor? bias, Tensor? type_embedding, "
    "Tensor? position, Tensor? position_index, Tensor? ln_weight, Tensor? ln_bias, float eps"
)


def run(
    backend: str,
    layout: str,
    images: list[Tensor],
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
    result: Tensor
    if torch.is_grad_enabled():
        parameters = (weight, bias, type_embedding, position, ln_weight, ln_bias)
        for p in parameters:
            if p is not None and p.requires_grad:
                numbers = (backend, layout, scale, shift, eps)
                result = apply_function(_PatchEmbed, *numbers, position_index, *parameters, *images)
                return result
    vectors = (bias, type_embedding, position, position_index, ln_weight, ln_bias)
    result = _FORWARD[backend](layout, images, weight, scale, shift, *vectors, eps)
    return result


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(
        backend: str,
        layout: str,
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
        vectors = (bias, type_embedding, position, position_index, ln_weight, ln_bias)
        out: Tensor = _FORWARD[backend](layout, list(images), weight, scale, shift, *vectors, eps)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.backend, *ctx.numbers = inputs[:_NUMBERS]
        ctx.save_for_backward(*inputs[_NUMBERS:])

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        position_index, weight, bias, type_embedding, position, ln_weight, ln_bias, *images = ctx.saved_tensors
        layout, scale, shift, eps = ctx.numbers
        dweight, dbias, dposition, dln_weight, dln_bias = differentiate_once(
            "patch_embed_bwd" + suffix_of(ctx.backend),
            *(dout, layout, images, weight, scale, shift, bias, type_embedding, position, position_index),
            *(ln_weight, ln_bias, eps),
        )
        return (
            *(None,) * _NUMBERS,
            *(None, dweight),
            dbias if bias is not None else None,
            dbias if type_embedding is not None else None,
            dposition if position is not None else None,
            dln_weight if ln_weight is not None else None,
            dln_bias if ln_bias is not None else None,
            *(None for _ in images),
        )

    vmap = staticmethod(refuse_vmap("patch_embed"))


_NUMBERS = 5  # what _PatchEmbed takes before its tensors


def _forward_cpu(*inputs: Any) -> Any:
    return native.kernels.patch_embed(*inputs, torch.get_num_threads())


def _backward_cpu(*inputs: Any) -> Any:
    return native.kernels.patch_embed_gradients(*inputs, torch.get_num_threads())


def _forward_cuda(layout: str, images: Sequence[Tensor], weight: Tensor, *rest: Any) -> Tensor:
    return kernel_cuda.forward(_frames(layout, images), *_ready((_tubelets(weight), *rest)))


def _backward_cuda(
    dout: Tensor, layout: str, images: Sequence[Tensor], weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    inputs = (_frames(layout, images), *_ready((_tubelets(weight), *rest)))
    dweight, *others = kernel_cuda.backward(kernel_ready(dout), *inputs)
    return dweight.view(weight.shape), *others


def _forward_triton(layout: str, images: Sequence[Tensor], weight: Tensor, *rest: Any) -> Tensor:
    # Imported by the first call: that takes a second, and CPU users may not have triton.
    from ofakern.ops.patch_embed import kernel_triton

    return kernel_triton.forward_triton(_frames(layout, images), *_ready((_tubelets(weight), *rest)))


def _backward_triton(
    dout: Tensor, layout: str, images: Sequence[Tensor], weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    from ofakern.ops.patch_embed import kernel_triton

    inputs = (_frames(layout, images), *_ready((_tubelets(weight), *rest)))
    dweight, *others = kernel_triton.backward_triton(kernel_ready(dout), *inputs)
    return dweight.view(weight.shape), *others


def _ready(values: Sequence[Any]) -> list[Any]:
    return [kernel_ready(x) if isinstance(x, Tensor) else x for x in values]


def _tubelets(weight: Tensor) -> Tensor:
    """A Conv2d's weight is that of a Conv3d with tubelets of one frame."""
    return weight if weight.ndim == 5 else weight.unsqueeze(2)


def _frames(layout: str, images: Sequence[Tensor]) -> list[Tensor]:
    """Images as `[n,T,C,H,W]`, planar or interleaved, all of a call alike."""
    views = []
    for image in images:
        view = (image if image.ndim > len(layout) else image.unsqueeze(0)).resolve_neg()
        view = view if "t" in layout else view.unsqueeze(1)
        letters = layout if "t" in layout else "t" + layout
        views.append(view.permute(0, *(1 + letters.index(letter) for letter in "tchw")))
    planar = all(x.stride(4) == 1 for x in views)
    interleaved = all(x.stride(2) == 1 and x.stride(4) == x.shape[2] for x in views)
    return views if planar or (interleaved and views[0].stride(4) != 1) else [x.contiguous() for x in views]


def _tokens(layout: str, images: Sequence[Tensor], weight: Tensor) -> int:
    patch = dict(zip("whtcd", reversed(weight.shape), strict=False))
    if weight.ndim == 4:
        patch["t"] = 1
    count = 0
    for image in images:
        sides = dict(zip(reversed("n" + layout), reversed(image.shape), strict=False))
        tokens = sides.get("n", 1)
        for letter in "thw":
            tokens = tokens * (sides.get(letter, 1) // patch[letter])
        count = count + tokens
    return count


def _forward_fake(layout: str, images: Sequence[Tensor], weight: Tensor, *rest: Any) -> Tensor:
    return weight.new_empty((_tokens(layout, images, weight), weight.shape[0]))


def _backward_fake(
    dout: Tensor, layout: str, images: Sequence[Tensor], weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *_, position, _, ln_weight, ln_bias, _ = rest
    absent = torch.empty(0, device=weight.device)
    optional = (absent.clone() if x is None else x.new_empty(x.shape) for x in (position, ln_weight, ln_bias))
    return weight.new_empty(weight.shape), absent.new_empty(weight.shape[0]), *optional


define(
    "patch_embed_fwd",
    f"({_INPUTS}) -> Tensor",
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    fake=_forward_fake,
    triton=_forward_triton,
)
_FORWARD = ops_of("patch_embed_fwd")
# An absent input's gradient is a tensor without elements: a schema cannot return `Tensor?`.
define(
    "patch_embed_bwd",
    f"(Tensor dout, {_INPUTS}) -> (Tensor dweight, Tensor dbias, Tensor dposition, Tensor dln_weight, Tensor dln_bias)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
    triton=_backward_triton,
)

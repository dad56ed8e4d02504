"""The CUDA C++ kernels of patch_embed (csrc/ops/patch_embed/patch_embed_cuda.cu)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ofakern.ops import native

LARGEST_WIDTH, LARGEST_DEPTH, MOST_CHANNELS = 2048, 8192, 16


def limit(weight: Tensor) -> str | None:
    """What the kernels cannot do with a weight `[D,C,kt,ph,pw]`, or None."""
    width, channels, depth = weight.shape[0], weight.shape[1], weight[0].numel()
    if width % 8 or width > LARGEST_WIDTH:
        return f"takes a D that is a multiple of 8 up to {LARGEST_WIDTH}, got {width}"
    if channels > MOST_CHANNELS or depth > LARGEST_DEPTH:
        return f"takes at most {MOST_CHANNELS} channels and {LARGEST_DEPTH} pixels a patch, got {channels} and {depth}"
    return None


def forward(images: Sequence[Tensor], weight: Tensor, scale: Any, shift: Any, *rest: Any) -> Tensor:
    """The registered op patch_embed_fwd; images and tensors as kernels read them."""
    out: Tensor = native.cuda_kernels.patch_embed(images, weight, _normalise(scale, shift), *rest)
    return out


def backward(
    dout: Tensor, images: Sequence[Tensor], weight: Tensor, scale: Any, shift: Any, *rest: Any
) -> tuple[Tensor, ...]:
    """The registered op patch_embed_bwd; no elements where an input is absent."""
    _, _, position, index, *_ = rest
    order = offsets = None
    if position is not None and not (len(images) == 1 and index is None):
        order, offsets = _places(images, weight, position.shape[0], index)
    grads = native.cuda_kernels.patch_embed_gradients(
        dout, order, offsets, images, weight, _normalise(scale, shift), *rest
    )
    return tuple(torch.empty(0, device=weight.device) if grad is None else grad for grad in grads)


def _normalise(scale: Any, shift: Any) -> Tensor:
    return torch.tensor([list(scale), list(shift)], dtype=torch.float64)


def _places(images: Sequence[Tensor], weight: Tensor, places: int, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens sorted by their row of the table, and where each row's begin; an index that is none is left out."""
    kt, ph, pw = weight.shape[2:]
    if index is None:
        cells = [(x.shape[1] // kt) * (x.shape[3] // ph) * (x.shape[4] // pw) for x in images]
        own = [torch.arange(n, device=weight.device).repeat(x.shape[0]) for n, x in zip(cells, images, strict=True)]
        place = torch.cat(own) if own else torch.empty(0, dtype=torch.int64, device=weight.device)
    else:
        place = index.long()
    place, order = torch.sort(place, stable=True)
    return order, torch.searchsorted(place, torch.arange(places + 1, device=weight.device))

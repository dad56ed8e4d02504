"""The oracle of `patch_embed`: normalised pixels, patches, a linear layer, embeddings, LayerNorm, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embed_reference(
    images: Sequence[Tensor],
    weight: Tensor,
    scale: Sequence[float],
    shift: Sequence[float],
    bias: Tensor | None = None,
    type_embedding: Tensor | None = None,
    position: Tensor | None = None,
    position_index: Tensor | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Tokens `[N,D]` of images `[n,T,C,H,W]`, packed in order; weight `[D,C,kt,ph,pw]`.

    A pixel becomes `scale[c] * pixel + shift[c]` (in float32 at least), then has weight's dtype.
    """
    dtype = weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    factors = torch.tensor([list(scale), list(shift)], dtype=torch.float64, device=weight.device).to(wide)
    factors = factors.view(2, 1, 1, -1, 1, 1)
    rows, places = [], []
    for x in images:
        cells = _patches((x.to(wide) * factors[0] + factors[1]).to(dtype), weight.shape[2:])
        rows.append(cells.flatten(0, 1))
        places.append(torch.arange(cells.shape[1], device=weight.device).repeat(x.shape[0]))
    if not rows:
        return weight.new_empty((0, weight.shape[0]))
    y = F.linear(torch.cat(rows), weight.flatten(1), None if bias is None else bias.to(dtype))
    if position is not None:
        y = y + position[torch.cat(places) if position_index is None else position_index.long()].to(dtype)
    if type_embedding is not None:
        y = y + type_embedding.to(dtype)
    if ln_weight is not None and ln_bias is not None:
        y = F.layer_norm(y, (y.shape[1],), ln_weight.to(dtype), ln_bias.to(dtype), eps)
    return y


def _patches(x: Tensor, patch: Sequence[int]) -> Tensor:
    """`[n,T,C,H,W]` to `[n, cells, C*kt*ph*pw]`."""
    n, frames, channels, height, width = x.shape
    kt, ph, pw = patch
    cells = x.reshape(n, frames // kt, kt, channels, height // ph, ph, width // pw, pw)
    cells = cells.permute(0, 1, 4, 6, 3, 2, 5, 7)
    return cells.reshape(n, (frames // kt) * (height // ph) * (width // pw), channels * kt * ph * pw)

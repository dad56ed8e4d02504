"""The vision transformer backbone of OFASys: CLIP-like, without class token and final norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn.attention import split_heads
from ofakern.nn.linear import Linear
from ofakern.ops.attention import AttentionLayout, attention


@dataclass(frozen=True)
class VitShape:
    """size: the native image side; blocks: the depth that is kept."""

    size: int
    patch: int
    width: int
    blocks: int
    heads: int


SHAPES = {
    "vit_base": VitShape(224, 16, 768, 9, 12),
    "vit_large": VitShape(224, 14, 1024, 18, 16),
    "vit_large_336": VitShape(336, 14, 1024, 18, 16),
    "vit_huge": VitShape(224, 14, 1280, 24, 16),
}


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=0.02)

    def forward(self, x: Tensor, layout: AttentionLayout, backend: str) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (split_heads(part, self.heads) for part in qkv.chunk(3, dim=-1))
        y: Tensor = self.out_proj(attention(q, k, v, layout, backend=backend).flatten(-2))
        return y


class _Block(nn.Module):
    def __init__(self, shape: VitShape, drop_path: float) -> None:
        super().__init__()
        self.attn = _Attention(shape.width, shape.heads)
        self.ln_1 = nn.LayerNorm(shape.width)
        self.mlp = nn.ModuleDict(
            {"c_fc": Linear(shape.width, 4 * shape.width), "c_proj": Linear(4 * shape.width, shape.width)}
        )
        self.ln_2 = nn.LayerNorm(shape.width)
        self.gelu = QuickGELU()
        self.drop_path = drop_path

    def forward(self, x: Tensor, images: int, layout: AttentionLayout, backend: str) -> Tensor:
        x = x + self._drop(self.attn(self.ln_1(x), layout, backend), images)
        return x + self._drop(self.mlp["c_proj"](self.gelu(self.mlp["c_fc"](self.ln_2(x)))), images)

    def _drop(self, y: Tensor, images: int) -> Tensor:
        if not self.training or self.drop_path == 0:
            return y
        keep = y.new_empty(images, 1, 1).bernoulli_(1.0 - self.drop_path).div_(1.0 - self.drop_path)
        return (y.reshape(images, -1, y.shape[-1]) * keep).flatten(0, 1)


class _Transformer(nn.Module):
    def __init__(self, shape: VitShape, drop_path: float) -> None:
        super().__init__()
        rates = [drop_path * block / max(shape.blocks - 1, 1) for block in range(shape.blocks)]
        self.resblocks = nn.ModuleList(_Block(shape, rate) for rate in rates)


class VisionTransformer(nn.Module):
    """images f32 `[n, 3, h, w]` (multiples of the patch) to patches `[n * gh * gw, width]`, row-major."""

    def __init__(self, kind: str, drop_path: float = 0.0, backend: str = "auto") -> None:
        super().__init__()
        if kind not in SHAPES:
            raise OfakernValueError(f"VisionTransformer: kind must be one of {sorted(SHAPES)}, got {kind!r}")
        self.shape = SHAPES[kind]
        self.backend = backend
        side = self.shape.size // self.shape.patch
        self.conv1 = nn.Conv2d(3, self.shape.width, self.shape.patch, stride=self.shape.patch, bias=False)
        # Row 0 belongs to the class token, which this backbone does not use; the published weights carry it.
        self.positional_embedding = nn.Parameter(torch.empty(side * side + 1, self.shape.width))
        nn.init.normal_(self.positional_embedding, std=self.shape.width**-0.5)
        self.ln_pre = nn.LayerNorm(self.shape.width)
        self.transformer = _Transformer(self.shape, drop_path)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches per column and row. Raises OfakernValueError for sizes that are not multiples of the patch."""
        patch = self.shape.patch
        if height % patch or width % patch:
            raise OfakernValueError(
                f"VisionTransformer: images must have sides that are multiples of {patch}, got {height} x {width}"
            )
        return height // patch, width // patch

    def forward(self, images: Tensor) -> Tensor:
        height, width = self.grid(images.shape[2], images.shape[3])
        x: Tensor = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = self.ln_pre(x + self._positions(height, width).to(x.dtype)).flatten(0, 1)
        layout = AttentionLayout.even(images.shape[0], height * width, height * width, x.device)
        for block in self.transformer.resblocks:
            x = block(x, images.shape[0], layout, self.backend)
        return x

    def _positions(self, height: int, width: int) -> Tensor:
        """`[height * width, C]`: the native grid's rows, resized bilinearly for other grids."""
        side = self.shape.size // self.shape.patch
        rows = self.positional_embedding[1:]
        if (height, width) == (side, side):
            return rows
        grid = rows.view(side, side, -1).permute(2, 0, 1)[None].float()
        resized = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)
        return resized[0].permute(1, 2, 0).flatten(0, 1)

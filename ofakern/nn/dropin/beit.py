"""BEiT's attention (transformers' and timm's layouts): the grid's bias stays a table of differences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.nn.dropin.base import (
    DropIn,
    attend,
    check_width,
    refuse_arguments,
    split_heads,
    unfold_table,
    width_refusal,
)
from ofakern.nn.dropin.layouts import Grid, padded_layout
from ofakern.nn.dropin.masks import Mask
from ofakern.nn.relative import RelativeBlock, SpecialRows, grid_extent, with_special

_UNSUPPORTED = ("output_attentions", "head_mask")


@dataclass(frozen=True)
class GridBias:
    """What `BeitRelativePositionBias` returns in place of `[1,H,N,N]`: a table, its window and perhaps a mask.

    table: `[H, 5M+4]`; window: (height, width) in patches, behind one class token. Adding a mask tensor keeps it beside
    the table, adding another bias of the same window adds the tables: all that the models do with it.
    """

    table: Tensor
    window: tuple[int, int]
    mask: Tensor | None = None

    def __add__(self, other: Any) -> GridBias:
        if isinstance(other, GridBias):
            if other.window != self.window or (self.mask is not None and other.mask is not None):
                raise OfakernValueError(
                    f"GridBias: the other bias must be of window {self.window} and only one may hold a mask, "
                    f"got {other.window}"
                )
            mask = other.mask if self.mask is None else self.mask
            return GridBias(self.table + other.table, self.window, mask)
        if not isinstance(other, Tensor):
            raise OfakernTypeError(f"GridBias: a mask must be a tensor, got {type(other).__name__}")
        return self.with_mask(other)

    __radd__ = __add__

    def with_mask(self, mask: Tensor) -> GridBias:
        """The same beside a mask tensor. (torch.compile cannot trace the sum with a tensor, but it traces this.)"""
        if self.mask is not None:
            raise OfakernValueError("GridBias: only one mask may be added, got another one")
        return replace(self, mask=mask)


def _index(height: int, width: int, device: torch.device) -> Tensor:
    """`with_special`'s order: column, normal (the identity: differences are parameter rows), corner, row."""
    extent = grid_extent(height, width)
    normal = torch.arange(2 * extent + 1, device=device)
    repeats = [(2 * extent + 2, extent + 1), (2 * extent + 3, extent + 1), (2 * extent + 1, extent + 1)]
    column, corner, row = (torch.full((count,), value, device=device) for value, count in repeats)
    return torch.cat([column, normal, corner, row])


@lru_cache(maxsize=16)
def _block(height: int, width: int, device: torch.device) -> RelativeBlock:
    extent = grid_extent(height, width)
    rows = 2 * extent + 4
    grid = RelativeBlock.build(torch.arange(2 * extent + 1), -extent)
    return with_special(grid, SpecialRows(row=rows - 3, column=rows - 2, corner=rows - 1)).to(device)


def _table(weight: Tensor, window: tuple[int, int]) -> Tensor:
    """weight `[(2h-1)(2w-1)+3, H]` to the table `[H, 5M+4]`."""
    height, width = window
    return unfold_table(
        weight, lambda device: _index(height, width, device), lambda: _block(height, width, weight.device)
    )


class BeitRelativePositionBias(DropIn):
    """transformers' BeitRelativePositionBias: the parameter `relative_position_bias_table`, the output a `GridBias`."""

    replaced_names = ("BeitRelativePositionBias",)
    needed = ("window_size", "num_relative_distance", "relative_position_bias_table")

    def __init__(self, config: Any) -> None:
        """config: image_size, patch_size and num_attention_heads of transformers' BeitConfig."""
        super().__init__()
        size = config.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        self.window_size = (height // config.patch_size, width // config.patch_size)
        self.num_relative_distance = (2 * self.window_size[0] - 1) * (2 * self.window_size[1] - 1) + 3
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros(self.num_relative_distance, config.num_attention_heads)
        )

    def forward(
        self, window_size: tuple[int, int], interpolate_pos_encoding: bool = False, dim_size: int | None = None
    ) -> GridBias:
        """window_size: (height, width) in patches; another size than the parameter's interpolates it, as published.

        dim_size: tokens of the sequence, needed with interpolate_pos_encoding; it must be height * width + 1.
        """
        height, width = int(window_size[0]), int(window_size[1])
        if interpolate_pos_encoding and dim_size != height * width + 1:
            raise OfakernValueError(
                f"BeitRelativePositionBias: dim_size must be {height * width + 1} (the window and the class token), "
                f"got {dim_size}"
            )
        return GridBias(_table(self._rows(height, width), (height, width)), (height, width))

    def _rows(self, height: int, width: int) -> Tensor:
        weight = self.relative_position_bias_table
        old_height, old_width = (2 * side - 1 for side in self.window_size)
        # The published code lays the rows out as (width, height): a window that is not square is always interpolated.
        if (old_width, old_height) == (2 * height - 1, 2 * width - 1):
            return weight
        grid = weight[:-3].reshape(1, old_width, old_height, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(2 * height - 1, 2 * width - 1), mode="bilinear")
        return torch.cat([grid.permute(0, 2, 3, 1).reshape(-1, weight.shape[1]), weight[-3:]])


class BeitAttention(DropIn):
    """transformers' BeitAttention (Bao et al., arXiv 2106.08254): keys `q_proj k_proj v_proj o_proj`.

    Its `attention_mask` is a mask tensor or the `GridBias` of `BeitRelativePositionBias` (replace both together).
    Differences: the second output is None; masks must be runs of keys, dense biases raise; output_attentions raises.
    """

    replaced_names = ("BeitAttention",)
    needed = ("num_attention_heads", "head_dim", "attention_dropout", "scaling", "q_proj", "k_proj", "v_proj", "o_proj")

    def __init__(self, config: Any) -> None:
        """config: anything with transformers' BeitConfig attributes."""
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        check_width("BeitAttention", self.head_dim)
        self.attention_dropout = config.attention_probs_dropout_prob
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        inner = self.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner)
        self.o_proj = nn.Linear(inner, config.hidden_size)

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return width_refusal(module.head_dim)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | GridBias | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """hidden_states `[B,N,D]` to (`[B,N,D]`, None)."""
        refuse_arguments("BeitAttention", kwargs, _UNSUPPORTED)
        q, k, v = (
            split_heads(layer(hidden_states), self.num_attention_heads)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = _attend(
            "BeitAttention", q, k, v, attention_mask, self.scaling, self.attention_dropout, self.training, self.backend
        )
        return self.o_proj(out), None


class TimmBeitAttention(DropIn):
    """timm's BEiT `Attention`: one `qkv` weight, `q_bias`, `v_bias`, `relative_position_bias_table`, `proj`.

    Differences: `shared_rel_pos_bias` is a `GridBias` (of `relative_bias` of another layer); a dense one raises. The
    state dict holds no `relative_position_index` (recent timm does not store it either).
    """

    replaced_names = ("Attention",)
    needed = ("num_heads", "scale", "qkv", "q_bias", "v_bias", "proj", "attn_drop", "proj_drop", "window_size")

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qkv_bias_separate: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: tuple[int, int] | None = None,
        attn_head_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        width = dim // num_heads if attn_head_dim is None else attn_head_dim
        check_width("TimmBeitAttention", width)
        inner = width * num_heads
        self.scale = width**-0.5
        self.qkv_bias_separate = qkv_bias_separate
        self.qkv = nn.Linear(dim, inner * 3, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(inner)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(inner)) if qkv_bias else None
        self.window_size = window_size
        self.relative_position_bias_table = None
        if window_size:
            rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1) + 3
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(inner, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return width_refusal(module.qkv.out_features // (3 * module.num_heads))

    def relative_bias(self) -> GridBias | None:
        """This layer's own bias; None without a window."""
        if self.relative_position_bias_table is None or self.window_size is None:
            return None
        window = (int(self.window_size[0]), int(self.window_size[1]))
        return GridBias(_table(self.relative_position_bias_table, window), window)

    def forward(self, x: Tensor, shared_rel_pos_bias: GridBias | None = None) -> Tensor:
        """x `[B,N,D]` (class token first) to `[B,N,D]`."""
        if shared_rel_pos_bias is not None and not isinstance(shared_rel_pos_bias, GridBias):
            raise OfakernTypeError(
                "TimmBeitAttention: shared_rel_pos_bias must be a GridBias, "
                f"got a dense {type(shared_rel_pos_bias).__name__}\nTry: relative_bias() of the layer that owns it."
            )
        if self.q_bias is None or self.v_bias is None:
            qkv = self.qkv(x)
        else:
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
            qkv = F.linear(x, self.qkv.weight, qkv_bias)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        bias = self.relative_bias()
        if shared_rel_pos_bias is not None:
            bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
        out = _attend("TimmBeitAttention", q, k, v, bias, self.scale, self.attn_drop.p, self.training, self.backend)
        result: Tensor = self.proj_drop(self.proj(out))
        return result


def _attend(
    where: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | GridBias | None,
    scale: float,
    dropout: float,
    training: bool,
    backend: str,
) -> Tensor:
    batch, tokens = q.shape[:2]
    term = None
    tables: list[Tensor] = []
    mask = bias
    if isinstance(bias, GridBias):
        height, width = bias.window
        if tokens != height * width + 1:
            raise OfakernValueError(
                f"{where}: hidden_states must have {height} x {width} patches and a class token, got {tokens} tokens"
            )
        term, tables, mask = Grid(height, width, special=True), [bias.table], bias.mask
    masks = [Mask(mask, where=where)] if isinstance(mask, Tensor) else []
    layout = padded_layout(batch, tokens, tokens, q.device, masks=masks, term=term)
    dropout_p = dropout if training else 0.0
    return attend(q, k, v, layout, tables=tables, scale=scale, dropout_p=dropout_p, backend=backend)

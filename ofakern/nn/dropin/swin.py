"""Swin's window attention: every window a sample, every region of a shifted window a run of keys inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn.dropin.base import DropIn, attend, check_width, refuse_arguments, split_heads, width_refusal
from ofakern.nn.dropin.layouts import Grid, MaskCache, content_cache, padded_layout
from ofakern.nn.dropin.masks import Mask
from ofakern.ops.attention import AttentionLayout, RelativeTerm
from ofakern.ops.library import LIBRARY, refuse_vmap

_WHERE = "SwinAttention"
_UNSUPPORTED = ("output_attentions", "head_mask")
_MASKED = -100.0  # what Swin adds to keep regions apart


class _RelativePositionBias(nn.Module):
    """Holds the table under the published key; nothing calls it."""

    def __init__(self, heads: int, window_size: tuple[int, int]) -> None:
        super().__init__()
        self.window_size = window_size
        rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))


class SwinAttention(DropIn):
    """transformers' SwinAttention (Liu et al., arXiv 2103.14030): keys `q_proj k_proj v_proj o_proj
    relative_position_bias.relative_position_bias_table`.

    A shifted window's tokens are sorted by region, so each region is a run of keys; its mask's -100 becomes -inf (a
    factor of e^-100). Differences: the second output is None; other masks and output_attentions raise.
    """

    replaced_names = ("SwinAttention",)
    needed = (
        *("num_attention_heads", "head_dim", "attention_dropout", "scaling"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "relative_position_bias"),
    )

    def __init__(self, config: Any, hidden_size: int, num_attention_heads: int, window_size: int) -> None:
        """config: attention_probs_dropout_prob and qkv_bias of transformers' SwinConfig."""
        super().__init__()
        self.config = config
        self.num_attention_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        check_width(_WHERE, self.head_dim)
        self.attention_dropout = config.attention_probs_dropout_prob
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.relative_position_bias = _RelativePositionBias(num_attention_heads, (window_size, window_size))

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        bias = module.relative_position_bias
        if not hasattr(bias, "relative_position_bias_table") or not hasattr(bias, "window_size"):
            return "relative_position_bias must have a table and a window_size, got another module"
        return width_refusal(module.head_dim)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """hidden_states `[B * windows, w*w, D]`; attention_mask `[windows, w*w, w*w]` of 0 and -100: which tokens of a
        shifted window share a region. Returns (the same shape, None)."""
        refuse_arguments(_WHERE, kwargs, _UNSUPPORTED)
        height, width = self.relative_position_bias.window_size
        windows, tokens, dim = hidden_states.shape
        if tokens != height * width:
            raise OfakernValueError(f"{_WHERE}: windows must have {height} x {width} tokens, got {tokens}")
        x = hidden_states
        regions = None
        if attention_mask is None:
            layout = padded_layout(windows, tokens, tokens, x.device, term=Grid(height, width, special=False))
        else:
            regions = _regions(attention_mask, windows, (height, width))
            layout = regions.layout
            x = x.reshape(windows * tokens, dim).index_select(0, regions.order).view(windows, tokens, dim)
        q, k, v = (split_heads(layer(x), self.num_attention_heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        weight = self.relative_position_bias.relative_position_bias_table
        out = attend(
            q,
            k,
            v,
            layout,
            tables=[weight.t()],  # a window's differences are the parameter's rows, in their order
            scale=self.scaling,
            dropout_p=self.attention_dropout if self.training else 0.0,
            backend=self.backend,
        )
        out = self.o_proj(out)
        if regions is not None:
            out = out.reshape(windows * tokens, dim).index_select(0, regions.inverse).view(windows, tokens, dim)
        return out, None


@dataclass(frozen=True)
class _Regions:
    """order: int64 `[B*windows*N]`, which token stands where once regions are runs; inverse: the way back."""

    layout: AttentionLayout
    order: Tensor
    inverse: Tensor


_cache: MaskCache[_Regions] = content_cache()  # the model makes an equal mask anew in every call


def _regions(mask: Tensor, windows: int, grid: tuple[int, int]) -> _Regions:
    if mask.dim() != 3 or mask.shape[0] == 0 or windows % mask.shape[0] or mask.shape[1] != mask.shape[2]:
        raise OfakernValueError(
            f"{_WHERE}: attention_mask must be [windows,N,N] with windows dividing {windows}, got {list(mask.shape)}"
        )
    if mask.shape[1] != grid[0] * grid[1]:
        raise OfakernValueError(f"{_WHERE}: attention_mask must have N={grid[0] * grid[1]}, got {list(mask.shape)}")
    if torch.compiler.is_compiling():
        order, visible = torch.ops.ofakern.window_regions(mask)
        return _of_batch(order, visible, windows, grid)
    marked = Mask(mask, where=_WHERE)
    return _cache.get((windows, grid, mask.device), [marked], lambda: _checked(mask, windows, grid))


def _checked(mask: Tensor, windows: int, grid: tuple[int, int]) -> _Regions:
    order, visible = (x.cpu() for x in _sorted_regions(mask))
    made = _of_batch(order, visible, windows, grid)
    lengths = [grid[0] * grid[1]] * windows
    layout = AttentionLayout.build(made.layout.visible, lengths, lengths, made.layout.terms)
    return _Regions(layout.to(mask.device), made.order.to(mask.device), made.inverse.to(mask.device))


def _of_batch(order: Tensor, visible: Tensor, windows: int, grid: tuple[int, int]) -> _Regions:
    """One image's regions repeated for a batch; order int64, visible int32 `[windows of an image, N]`, per window."""
    tokens = grid[0] * grid[1]
    device = order.device
    repeats = windows // order.shape[0]
    start = torch.arange(windows, device=device)[:, None] * tokens
    runs = (visible.repeat(repeats, 1, 1) + start[..., None]).view(-1, 2).to(torch.int32)
    order_line = order.repeat(repeats, 1).view(-1)
    coordinates = Grid(*grid, special=False).coordinates(1, tokens, tokens, device)
    q_coord, k_coord = (x.index_select(0, order_line) for x in coordinates)
    offsets = torch.arange(windows + 1, dtype=torch.int32, device=device) * tokens
    layout = AttentionLayout(
        runs,
        offsets,
        offsets.clone(),
        torch.ones(windows * tokens, dtype=torch.uint8, device=device),
        torch.stack([offsets[:-1], offsets[1:]], dim=1),
        (RelativeTerm(q_coord, k_coord, runs.clone(), (2 * grid[0] - 1) * (2 * grid[1] - 1)),),
    )
    full = order_line + start.expand(windows, tokens).reshape(-1)
    return _Regions(layout, full, torch.argsort(full))


def _sorted_regions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(order, visible) of a mask `[windows,N,N]`: int64 `[windows,N]`, int32 `[windows,N,2]` within each window.

    Raises OfakernValueError unless 0 marks the pairs of an equivalence (tokens of one region) and -100 or less all
    others.
    """
    if mask.requires_grad or not mask.is_floating_point():
        raise OfakernValueError(f"{_WHERE}: attention_mask must be floating without gradient, got {mask.dtype}")
    same = mask == 0
    region = same.to(torch.int8).argmax(-1)  # the first token of a token's region names it
    if not bool(((mask <= _MASKED) | same).all()) or not torch.equal(same, region[:, None] == region[..., None]):
        raise OfakernValueError(
            f"{_WHERE}: attention_mask must keep the regions of shifted windows apart (0 inside, -100 outside), "
            "got another mask"
        )
    order = torch.argsort(region, dim=-1, stable=True)
    line = region.gather(1, order)
    first = torch.searchsorted(line, line)
    last = torch.searchsorted(line, line, right=True)
    return order, torch.stack([first, last], dim=-1).to(torch.int32)


def _window_regions_fake(mask: Tensor) -> tuple[Tensor, Tensor]:
    windows, tokens = mask.shape[:2]
    return (
        mask.new_empty((windows, tokens), dtype=torch.int64),
        mask.new_empty((windows, tokens, 2), dtype=torch.int32),
    )


LIBRARY.define("window_regions(Tensor mask) -> (Tensor, Tensor)")
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("window_regions", _sorted_regions, _device)
torch.library.register_fake("ofakern::window_regions", _window_regions_fake, lib=LIBRARY)
torch.library.register_vmap("ofakern::window_regions", refuse_vmap("window_regions"), lib=LIBRARY)

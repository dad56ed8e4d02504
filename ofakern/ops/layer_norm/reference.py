"""The oracle of the fused LayerNorms in plain torch; the contract: csrc/ops/layer_norm/layer_norm.h.

Works in any float dtype (arithmetic in at least float32), differentiates any number of times. It imports nothing of
ours, so that no kernel can bend it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROW_STREAM = 0xFFFFFFFF
_OFFSET_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # the same 64 bits as a signed number


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of `total = residual + dropout(x)`, all `[..., D]`; returns (normed, total) in x's dtype."""
    with torch.autocast(x.device.type, enabled=False):
        stat = torch.promote_types(x.dtype, torch.float32)
        branch = x.to(stat)
        if dropout_p > 0.0:
            if dropout_seed is None:
                raise ValueError("add_layer_norm_reference: dropout_seed must be given when dropout_p > 0, got None")
            keep = dropout_keep(dropout_seed, dropout_p, x.numel() // max(x.shape[-1], 1), x.shape[-1])
            branch = branch * (keep.view(x.shape) * (1.0 / (1.0 - dropout_p)))
        total = (residual.to(stat) + branch).to(x.dtype)
        return _normed(total.to(stat), weight, bias, eps).to(x.dtype), total


def gelu_layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm of the exact GELU of x `[..., D]`."""
    with torch.autocast(x.device.type, enabled=False):
        stat = torch.promote_types(x.dtype, torch.float32)
        return _normed(torch.nn.functional.gelu(x.to(stat)), weight, bias, eps).to(x.dtype)


def head_scale_layer_norm_reference(
    x: Tensor, head_scale: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """LayerNorm over all heads together of x `[N, H, K]` times head_scale `[H]`: `[N, H * K]`."""
    with torch.autocast(x.device.type, enabled=False):
        stat = torch.promote_types(x.dtype, torch.float32)
        scaled = (x.to(stat) * head_scale.to(stat)[:, None]).flatten(-2)
        return _normed(scaled, weight, bias, eps).to(x.dtype)


def embed_layer_norm_reference(
    tokens: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor,
    type_table: Tensor | None = None,
    types: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm of `scale * table[tokens] + type_table[types]`; tokens and types int64 `[...]`, tables `[V, D]`,
    `[T, D]`; types None: row 0. Returns `[..., D]` in the tables' dtype."""
    with torch.autocast(table.device.type, enabled=False):
        stat = torch.promote_types(table.dtype, torch.float32)
        embed = table[tokens].to(stat) * scale
        if type_table is not None:
            embed = embed + (type_table[0] if types is None else type_table[types]).to(stat)
        return _normed(embed, weight, bias, eps).to(table.dtype)


def dropout_keep(dropout_seed: Tensor, dropout_p: float, rows: int, width: int) -> Tensor:
    """bool `[rows, width]`: what dropout keeps. Word d mod 4 of Philox4x32-10 at the counter (d / 4, row, 0, 2^32 - 1)
    decides column d of a row."""
    device = dropout_seed.device
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(width, device=device)
    key = dropout_seed[0] + dropout_seed[1] * _OFFSET_MULTIPLIER  # int64 wraps: arithmetic modulo 2^64
    zero = torch.zeros_like(row)
    words = _philox4x32((column >> 2, row, zero, zero + _ROW_STREAM), (key & _WORD, (key >> 32) & _WORD))
    lane = (column & 3).expand(rows, width)
    word = torch.stack(words, dim=-1).gather(-1, lane[..., None]).squeeze(-1)
    return word >= min(int(dropout_p * 2.0**32 + 0.5), _WORD)


def _philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words (broadcast together); four words per counter."""
    shape = torch.broadcast_shapes(*(word.shape for word in counter))  # type: ignore[no-untyped-call]
    c0, c1, c2, c3 = (word.expand(shape) for word in counter)
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps like uint64
        c0, c1, c2, c3 = (
            ((b >> 32) & _WORD) ^ c1 ^ k0,
            b & _WORD,
            ((a >> 32) & _WORD) ^ c3 ^ k1,
            a & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _normed(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = z - z.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred * torch.rsqrt(variance + eps) * weight.to(z.dtype) + bias.to(z.dtype)

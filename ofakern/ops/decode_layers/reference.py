"""The oracle of `decode_layers`: a decoder's layers over one token of every row, in plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Layer = Mapping[str, Any]


def decode_layers_reference(
    x: Tensor,
    layers: Sequence[Layer],
    own: Sequence[tuple[Tensor, Tensor]],
    source: Sequence[tuple[Tensor, Tensor]],
    lengths: Sequence[int],
    row_offsets: Sequence[int],
    slots: Tensor,
    table: Tensor,
    counts: Sequence[int],
    *,
    heads: int,
    norm_first: bool,
    activation: str,
    finish: tuple[Tensor, Tensor, float] | None,
    own_bias: Tensor | None = None,
    cross_bias: Tensor | None = None,
) -> Tensor:
    """`[R,D]` of x `[R,D]`.

    A layer: projections `own`, `own_out`, `cross`, `cross_out`, `fc1`, `fc2` as (weight, bias), norms as (weight, bias,
    eps) or None, `own_heads`, `cross_heads`, `residual`, `own_scale`, `cross_scale`. own: keys and values `[S,H,K]` by
    slot, written here. source: keys and values `[sum of lengths,H,K]`.
    """
    rows_of = [range(row_offsets[b], row_offsets[b + 1]) for b in range(len(counts))]
    if norm_first:
        seen = _norm(x, layers[0]["own_norm"])
    else:
        seen = x
    for number, layer in enumerate(layers):
        q, k, v = (part.reshape(len(x), heads, -1) for part in _linear(seen, layer["own"]).chunk(3, 1))
        keys, values = own[number]
        keys[slots.long()], values[slots.long()] = k, v
        found, first = torch.empty_like(q), 0
        for b, rows in enumerate(rows_of):
            for r in rows:
                past = table[r, : counts[b]].long()
                bias = (
                    None if own_bias is None else own_bias[min(number, len(own_bias) - 1), :, first : first + counts[b]]
                )
                found[r] = _attend(q[r], keys[past], values[past], bias, layer["own_scale"], layer["own_heads"])
            first += counts[b]
        x, seen = _join(_linear(found.flatten(1), layer["own_out"]), x, layer, "own", "cross", norm_first)
        q = _linear(seen, layer["cross"]).reshape(len(x), heads, -1)
        keys, values = source[number]
        found, first = torch.empty_like(q), 0
        for rows, length in zip(rows_of, lengths, strict=True):
            part = slice(first, first + length)
            for r in rows:
                bias = None if cross_bias is None else cross_bias[:, part]
                found[r] = _attend(q[r], keys[part], values[part], bias, layer["cross_scale"], layer["cross_heads"])
            first += length
        x, seen = _join(_linear(found.flatten(1), layer["cross_out"]), x, layer, "cross", "final", norm_first)
        h = _linear(seen, layer["fc1"])
        h = _norm(F.gelu(h) if activation == "gelu" else F.relu(h), layer["ffn_norm"])
        total = (x if layer["residual"] is None else x * layer["residual"].to(x.dtype)) + _linear(h, layer["fc2"])
        if norm_first:
            last = number + 1 == len(layers)
            x, seen = total, _norm(total, finish if last else layers[number + 1]["own_norm"])
        else:
            x = seen = _norm(total, layer["final_norm"])
    return seen


def _join(y: Tensor, x: Tensor, layer: Layer, own: str, following: str, norm_first: bool) -> tuple[Tensor, Tensor]:
    total = x + _norm(y, layer[f"{own}_extra"])
    if norm_first:
        return total, _norm(total, layer[f"{following}_norm"])
    normed = _norm(total, layer[f"{own}_norm"])
    return normed, normed


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float, head_weights: Tensor | None
) -> Tensor:
    """`[H,K]` of q `[H,K]` over keys `[n,H,K]`; scores in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("hk,nhk->hn", q.to(wide), keys.to(wide)) * scale
    if bias is not None:
        scores = scores + bias
    out = torch.einsum("hn,nhk->hk", scores.softmax(1), values.to(wide))
    return (out if head_weights is None else out * head_weights[:, None]).to(q.dtype)


def _linear(x: Tensor, layer: tuple[Tensor, Tensor | None]) -> Tensor:
    weight, bias = layer
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _norm(x: Tensor, norm: tuple[Tensor, Tensor, float] | None) -> Tensor:
    if norm is None:
        return x
    weight, bias, eps = norm
    return F.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), bias.to(x.dtype), eps)

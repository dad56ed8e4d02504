"""One decoder layer's step: its projections on packed weights around two calls of `decode_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ofakern.model.decode.weights import DecodeWeights, LayerWeights
from ofakern.model.stacks import Decoder
from ofakern.nn.attention import MultiheadAttention, split_heads
from ofakern.nn.layers import DecoderLayer
from ofakern.nn.light import merge
from ofakern.ops.decode_attention import KeyValueCache, decode_attention


@dataclass(frozen=True)
class StepShape:
    """What all layers share in a step; integers are int32, and all is on the model's device.

    row_offsets: `[B + 1]`, rows of each sample. slots: `[R]`, where this step's keys are written.
    table `[R, T]`, counts `[B]`: each row's slots up to this step. cross_bias: f32 `[H, sum of S]` or None. everybody:
    `[2]`, offsets of all rows as one sample. experts: (expert, its rows: int64, or bool `[R, 1]` in a CUDA graph),
    empty without experts. backend: of `decode_attention`.
    """

    row_offsets: Tensor
    slots: Tensor
    table: Tensor
    counts: Tensor
    cross_bias: Tensor | None
    everybody: Tensor
    experts: Sequence[tuple[int, Tensor]]
    backend: str


@dataclass(frozen=True)
class LayerCaches:
    """own, source: of this layer. prefix: learned keys that every row sees, or None."""

    own: KeyValueCache
    source: KeyValueCache
    prefix: KeyValueCache | None


def run_layers(
    decoder: Decoder,
    weights: DecodeWeights,
    caches: Sequence[LayerCaches],
    shape: StepShape,
    own_bias: Tensor | None,
    x: Tensor,
) -> Tensor:
    """All layers' steps, in turn. own_bias: f32 `[layers, H, sum of counts]`, one layer where all share it."""
    for number, layer in enumerate(decoder.decoder_layers()):
        bias = None if own_bias is None else own_bias[min(number, len(own_bias) - 1)]
        x = step_layer(layer, weights.layers[number], caches[number], shape, bias, x)
    return x


def step_layer(
    layer: DecoderLayer,
    weights: LayerWeights,
    caches: LayerCaches,
    shape: StepShape,
    own_bias: Tensor | None,
    x: Tensor,
) -> Tensor:
    """x `[R, D]`, one token of every row, to `[R, D]`; its keys and values are added to the cache.

    own_bias: f32 `[H, sum of counts]`, what self-attention's scores get in this layer.
    """
    heads = layer.self_attn.heads
    q, k, v = (split_heads(part, heads) for part in weights.own.parts(layer.before(x, layer.self_attn_layer_norm)))
    caches.own.write(shape.slots, k, v)
    y = weights.own_out(_attend_own(layer.self_attn, caches, shape, own_bias, q).flatten(1))
    x, seen = layer.join(y, x, layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, None, layer.self_attn_ln)
    q = split_heads(weights.cross(seen), heads)
    attend = _call(layer.encoder_attn, shape)
    y = attend(q, caches.source, shape.row_offsets, bias=shape.cross_bias)
    y = weights.cross_out(y.flatten(1))
    x, seen = layer.join(y, x, layer.encoder_attn_layer_norm, layer.final_layer_norm, None, layer.cross_attn_ln)
    return layer.leave(_feed_forward(layer, weights, shape, seen), x, None)


def _attend_own(
    attention: MultiheadAttention, caches: LayerCaches, shape: StepShape, bias: Tensor | None, q: Tensor
) -> Tensor:
    """Over the rows' own past and, merged with it, the learned prefix."""
    attend = _call(attention, shape)
    own = partial(attend, q, caches.own, shape.row_offsets, bias=bias, slots=shape.table, counts=shape.counts)
    if caches.prefix is None:
        out: Tensor = own()
        return out
    learned = attend(q, caches.prefix, shape.everybody, return_lse=True)
    return merge(*own(return_lse=True), *learned)


def _call(attention: MultiheadAttention, shape: StepShape) -> partial[Any]:
    head_scale = attention.c_attn if attention.use_head_scale else None
    return partial(decode_attention, head_scale=head_scale, scale=attention.scale, backend=shape.backend)


def _feed_forward(layer: DecoderLayer, weights: LayerWeights, shape: StepShape, seen: Tensor) -> Tensor:
    if not shape.experts:
        return _through(layer, weights, None, seen)
    if len(shape.experts) == 1:
        return _through(layer, weights, shape.experts[0][0], seen)
    out = torch.empty_like(seen)
    for expert, rows in shape.experts:
        if rows.dtype == torch.bool:  # their number is not known: all go through every expert
            out = torch.where(rows, _through(layer, weights, expert, seen), out)
        else:
            out[rows] = _through(layer, weights, expert, seen[rows])
    return out


def _through(layer: DecoderLayer, weights: LayerWeights, expert: int | None, seen: Tensor) -> Tensor:
    fc1, fc2 = weights.fc[expert]
    return fc2(layer.hidden(fc1(seen)))

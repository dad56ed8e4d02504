"""A decoder's layers as one native call: which decoders and which steps take it, and what it is given.

All others run layer by layer (`layer.py`), with the same numbers up to the roundings of torch's own norms.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ofakern.model.decode.weights import MOST_ROWS, DecodeWeights, LayerWeights
from ofakern.model.stacks import Decoder
from ofakern.nn.attention import MultiheadAttention
from ofakern.nn.layers import DecoderLayer
from ofakern.ops.decode_layers import LayerParts, PreparedLayers, StepNorm, prepare_layers
from ofakern.ops.decode_layers.op import BACKENDS


def why_by_layer(decoder: Decoder, weights: DecodeWeights) -> str | None:
    """Why no step of this decoder is one call; None: those of `whole_step` are."""
    if not weights.packs:
        return "its weights are not packed (another device or dtype, training, or no kernels)"
    if BACKENDS.unavailable["cpu"] is not None:
        return BACKENDS.unavailable["cpu"]
    if decoder.backend not in ("auto", "cpu"):
        return f"its attention was given the backend {decoder.backend!r}"
    if decoder.decoder_prompt_encoder is not None:
        return "it has a learned prefix, whose attention merges with that of the rows' own past"
    if any(layer.adapter is not None for layer in decoder.decoder_layers()):
        return "it has bottleneck adapters"
    if not all(_is_plain(norm) for norm in _norms(decoder)):
        return "one of its norms is not torch's LayerNorm with weight and bias, or has hooks"
    return None


def whole_step(decoder: Decoder, weights: DecodeWeights, rows: int, experts: tuple[int, ...]) -> PreparedLayers | None:
    """What a step of `rows` rows multiplies by, where it is one native call; experts: whose the rows are.

    None: it goes layer by layer, since the decoder's layers do, the rows are so many that torch's products take them,
    or belong to several experts.
    """
    if not weights.by_layer_asked:
        weights.by_layer, weights.by_layer_asked = why_by_layer(decoder, weights), True
    many = rows > MOST_ROWS and not weights.int8
    if weights.by_layer is not None or many or len(experts) > 1:
        return None
    expert = experts[0] if experts else None
    if expert not in weights.prepared:
        weights.prepared[expert] = _prepare(decoder, weights, expert)
    return weights.prepared[expert]


def _prepare(decoder: Decoder, weights: DecodeWeights, expert: int | None) -> PreparedLayers:
    config = decoder.config
    layers = decoder.decoder_layers()
    return prepare_layers(
        [_parts(layer, own, expert) for layer, own in zip(layers, weights.layers, strict=True)],
        heads=config.heads,
        norm_first=config.normalize_before,
        activation=layers[0].config.activation,
        finish=_step_norm(decoder.layer_norm),
    )


def _parts(layer: DecoderLayer, weights: LayerWeights, expert: int | None) -> LayerParts:
    fc1, fc2 = weights.fc[expert if expert in weights.fc else None]
    own_norm, cross_norm, final_norm = (
        _step_norm(norm) for norm in (layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm)
    )
    assert own_norm is not None and cross_norm is not None and final_norm is not None
    return LayerParts(
        own=weights.own.packed(),
        own_out=weights.own_out.packed(),
        cross=weights.cross.packed(),
        cross_out=weights.cross_out.packed(),
        fc1=fc1.packed(),
        fc2=fc2.packed(),
        own_norm=own_norm,
        cross_norm=cross_norm,
        final_norm=final_norm,
        own_extra=_step_norm(layer.self_attn_ln),
        cross_extra=_step_norm(layer.cross_attn_ln),
        ffn_norm=_step_norm(layer.ffn_layernorm),
        own_heads=_head_weights(layer.self_attn),
        cross_heads=_head_weights(layer.encoder_attn),
        residual=layer.w_resid,
        own_scale=layer.self_attn.scale,
        cross_scale=layer.encoder_attn.scale,
    )


def _head_weights(attention: MultiheadAttention) -> nn.Parameter | None:
    return attention.c_attn if attention.use_head_scale else None


def _step_norm(norm: nn.LayerNorm | None) -> StepNorm | None:
    return None if norm is None else StepNorm(norm.weight, norm.bias, norm.eps)


def _norms(decoder: Decoder) -> Iterator[nn.Module]:
    names = (
        "self_attn_layer_norm",
        "self_attn_ln",
        "encoder_attn_layer_norm",
        "cross_attn_ln",
        "final_layer_norm",
        "ffn_layernorm",
    )
    found = [getattr(layer, name) for layer in decoder.decoder_layers() for name in names]
    yield from (norm for norm in (*found, decoder.layer_norm) if norm is not None)


def _is_plain(norm: nn.Module) -> bool:
    return (
        type(norm) is nn.LayerNorm
        and len(norm.normalized_shape) == 1
        and norm.weight is not None
        and norm.bias is not None
        and not (norm._forward_hooks or norm._forward_pre_hooks)
    )

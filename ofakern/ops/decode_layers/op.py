"""The compiled call: weights bound once in an object of the module's, a step's tensors handed over flat.

It is no op of torch's dispatcher: it writes into caches in place and holds weights that no graph sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ofakern.ops import native
from ofakern.ops.selection import Backends

if TYPE_CHECKING:
    from ofakern.ops.decode_layers.api import LayerParts, StepNorm
    from ofakern.ops.decode_linear import PackedWeight

BACKENDS = Backends("decode_layers", "decode_layers")


def bind(
    layers: Sequence[LayerParts],
    finish: StepNorm | None,
    like: Tensor,
    hidden: int,
    heads: int,
    norm_first: bool,
    gelu: bool,
) -> Any:
    """The native object. The order of a layer's parts is that of python_bindings/bind_decode_layers.cpp."""
    parts = [
        (
            *_projection(layer.own),
            *_projection(layer.own_out),
            *_projection(layer.cross),
            *_projection(layer.cross_out),
            *_projection(layer.fc1),
            *_projection(layer.fc2),
            *_norm(layer.own_norm),
            *_norm(layer.own_extra),
            *_norm(layer.cross_norm),
            *_norm(layer.cross_extra),
            *_norm(layer.final_norm),
            *_norm(layer.ffn_norm),
            _float(layer.own_heads),
            _float(layer.cross_heads),
            _float(layer.residual),
            layer.own_scale,
            layer.cross_scale,
        )
        for layer in layers
    ]
    width = layers[0].own.depth
    return native.kernels.decode_layers_prepare(parts, _norm(finish), like, width, hidden, heads, norm_first, gelu)


def run(
    bound: Any,
    x: Tensor,
    caches: list[Tensor],
    row_offsets: Tensor,
    slots: Tensor,
    table: Tensor,
    counts: Tensor,
    own_bias: Tensor | None,
    cross_bias: Tensor | None,
) -> Tensor:
    out: Tensor = native.kernels.decode_layers(
        bound, x, caches, row_offsets, slots, table, counts, own_bias, cross_bias, torch.get_num_threads()
    )
    return out


def _projection(weight: PackedWeight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return weight.data, weight.scale, weight.bias


def _norm(norm: StepNorm | None) -> tuple[Tensor | None, Tensor | None, float]:
    return (None, None, 0.0) if norm is None else (_float(norm.weight), _float(norm.bias), norm.eps)


def _float(x: Tensor | None) -> Tensor | None:
    """A row-major copy in float32 of its own: later changes of the parameter are not seen."""
    return None if x is None else x.detach().to(torch.float32, copy=True).contiguous()

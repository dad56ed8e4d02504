"""The public door of `decode_layers`: weights are prepared once, every argument of a step is checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ofakern.errors import BackendError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.ops import log
from ofakern.ops.decode_attention import KeyValueCache
from ofakern.ops.decode_layers import op
from ofakern.ops.decode_linear import PackedWeight

_WHERE = "decode_layers"
_PREPARED = "takes no prepared layers"
ACTIVATIONS = ("gelu", "relu")
_logger = logging.getLogger("ofakern.ops.decode_layers")


@dataclass(frozen=True)
class StepNorm:
    """A LayerNorm over the last dimension: weight, bias `[D]`."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer. Norms are named as in csrc/ops/decode_layers/decode_layers.h; None: there is none.

    own: query, key and value together. own_heads, cross_heads: `[H]`, weights of the heads, or None. residual: `[D]`,
    what the feed-forward part's residual is multiplied by, or None. own_scale, cross_scale: of the scores.
    """

    own: PackedWeight
    own_out: PackedWeight
    cross: PackedWeight
    cross_out: PackedWeight
    fc1: PackedWeight
    fc2: PackedWeight
    own_norm: StepNorm
    cross_norm: StepNorm
    final_norm: StepNorm
    own_extra: StepNorm | None = None
    cross_extra: StepNorm | None = None
    ffn_norm: StepNorm | None = None
    own_heads: Tensor | None = None
    cross_heads: Tensor | None = None
    residual: Tensor | None = None
    own_scale: float = 1.0
    cross_scale: float = 1.0


@dataclass(frozen=True)
class PreparedLayers:
    """Opaque: what `decode_layers` multiplies by, for the CPU of this process. dtype: of its rows; width: D."""

    layers: int
    width: int
    heads: int
    dtype: torch.dtype
    bound: Any


def prepare_layers(
    layers: Sequence[LayerParts],
    *,
    heads: int,
    norm_first: bool = True,
    activation: str = "gelu",
    finish: StepNorm | None = None,
) -> PreparedLayers:
    """Binds a decoder's layers. Packed weights are shared, norms and scales copied in float32.

    Args:
        layers: at least one; all of one dtype and width.
        heads: H, of both attentions; divides D.
        norm_first: norms stand before their sub-layers (pre-norm), else behind the addition.
        activation: "gelu" (the exact one) or "relu".
        finish: the norm behind the last layer.

    Raises:
        OfakernTypeError, OfakernValueError: parts that do not fit together.
        BackendError: the compiled kernels are missing.
    """
    if not layers:
        raise OfakernValueError(f"{_WHERE}: layers must not be empty, got none")
    if activation not in ACTIVATIONS:
        raise OfakernValueError(f"{_WHERE}: activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
    for n, layer in enumerate(layers):
        for name in ("own", "own_out", "cross", "cross_out", "fc1", "fc2"):
            weight = getattr(layer, name)
            if not isinstance(weight, PackedWeight):
                raise OfakernTypeError(
                    f"{_WHERE}: layers[{n}].{name} must be a PackedWeight, got {type(weight).__name__}\n"
                    "Try: prepack_weight"
                )
    own = layers[0].own
    hidden = sum(layers[0].fc1.widths)
    bound = op.bind(layers, finish, torch.empty(0, dtype=own.dtype), hidden, heads, norm_first, activation == "gelu")
    return PreparedLayers(len(layers), own.depth, heads, own.dtype, bound)


def decode_layers(
    x: Tensor,
    prepared: PreparedLayers,
    own: Sequence[KeyValueCache],
    source: Sequence[KeyValueCache],
    row_offsets: Tensor,
    slots: Tensor,
    table: Tensor,
    counts: Tensor,
    *,
    own_bias: Tensor | None = None,
    cross_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of every row through all layers; its keys and values are written into the own caches.

    Args:
        x: `[R,D]` in the layers' dtype, on the CPU.
        own: each layer's cache of slots, not int8; alike in size. source: each layer's packed source cache.
        row_offsets: int32 `[B+1]`, the rows of each sample, as in `decode_attention`.
        slots: int32 `[R]`, where this step's keys go, no two the same.
        table: int32 `[R,T]`, every row's slots with this step's; counts: int32 `[B]`, how many a sample's rows see.
        own_bias: float32 `[L,H,sum of counts]`, or `[1,...]` for all layers. cross_bias: float32 `[H,sum of keys]`.
        backend: "auto" or "cpu": prepared layers belong to the CPU kernel.

    Returns:
        `[R,D]` in x's dtype. The bits are those of `decode_linear`, `decode_attention`, `add_layer_norm` and
        `gelu_layer_norm` called one after the other, whatever the threads.

    Raises:
        OfakernTypeError, OfakernValueError: an argument of the wrong type, dtype, device or shape.
        OfakernRuntimeError: x needs a gradient (there is none).
        BackendError: the backend cannot run the call.
    """
    _check(x, prepared, own, source)
    chosen = op.BACKENDS.select(backend, x)
    if chosen == "reference":
        raise BackendError(f"{_WHERE}: backend 'reference' cannot run this call: {_PREPARED}")
    if log.ENABLED:
        log.once(_logger, f"decode_layers x{list(x.shape)} {x.dtype} layers {prepared.layers} -> {chosen}")
    caches: list[Tensor] = []
    for mine, theirs in zip(own, source, strict=True):
        assert theirs.runs is not None
        caches += (mine.keys, mine.values, theirs.keys, theirs.values, theirs.runs)
    return op.run(prepared.bound, x, caches, row_offsets, slots, table, counts, own_bias, cross_bias)


def refusals(
    x: Tensor,
    prepared: PreparedLayers,
    own: Sequence[KeyValueCache],
    source: Sequence[KeyValueCache],
    *arguments: Any,
    backend: str = "auto",
    **options: Any,
) -> tuple[str, dict[str, str | None]]:
    """What `ofakern.explain` prints of a call of `decode_layers`."""
    _check(x, prepared, own, source)
    wanted, reasons = op.BACKENDS.reasons(backend, x)
    return wanted, reasons | {"reference": _PREPARED}


def _check(x: Tensor, prepared: PreparedLayers, own: Sequence[KeyValueCache], source: Sequence[KeyValueCache]) -> None:
    if not isinstance(prepared, PreparedLayers):
        raise OfakernTypeError(
            f"{_WHERE}: prepared must be PreparedLayers, got {type(prepared).__name__}\nTry: prepare_layers"
        )
    if not isinstance(x, Tensor):
        raise OfakernTypeError(f"{_WHERE}: x must be a tensor, got {type(x).__name__}")
    if x.dtype != prepared.dtype:
        raise OfakernTypeError(f"{_WHERE}: x must have the layers' dtype ({prepared.dtype}), got {x.dtype}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise OfakernRuntimeError(f"{_WHERE}: x must not need a gradient, got requires_grad=True\nTry: torch.no_grad()")
    for name, caches, is_source in (("own", own, False), ("source", source, True)):
        if len(caches) != prepared.layers:
            raise OfakernValueError(
                f"{_WHERE}: {name} must have a cache per layer ({prepared.layers}), got {len(caches)}"
            )
        for n, cache in enumerate(caches):
            if cache.key_scales is not None or (cache.runs is not None) != is_source or cache.packed != is_source:
                wanted = "a packed source cache" if is_source else "a cache of slots"
                raise OfakernValueError(f"{_WHERE}: {name}[{n}] must be {wanted} and not int8, got another")

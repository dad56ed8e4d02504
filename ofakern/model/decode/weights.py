"""The decoder's projections as a step multiplies by them: packed once per model, again when a parameter has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.errors import BackendError, OfakernValueError
from ofakern.model.stacks import Decoder
from ofakern.nn.layers import DecoderLayer
from ofakern.ops.decode_layers import PreparedLayers
from ofakern.ops.decode_linear import PackedWeight, decode_linear, prepack_weight
from ofakern.ops.decode_linear.op import BACKENDS
from ofakern.ops.selection import KERNEL_DTYPES

# Above it a step is no longer a skinny product, and torch's own is as fast.
MOST_ROWS = 96
QUANTIZATIONS = (None, "int8")
_VALUES = 4
_RANGES = 4


class Projection:
    """One or several linear layers `(weight [N, K], bias [N] or None)` that share an input.

    packs: whether there is a kernel that takes them packed.

    The call takes x `[R, K]` and gives one `[R, N]` for each layer. Packed at the first call of at most `MOST_ROWS`
    rows where there is a kernel for the weights; int8 weights are packed whatever the rows, so that their numbers are
    the same in every batch.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor | None]], int8: bool, pack: bool) -> None:
        self._layers = tuple(layers)
        self._int8 = int8
        self.packs = pack
        self._packed: PackedWeight | None = None

    @classmethod
    def of(cls, modules: Sequence[nn.Linear], int8: bool, pack: bool) -> Projection:
        return cls([(module.weight, module.bias) for module in modules], int8, pack)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.packs or (x.shape[0] > MOST_ROWS and not self._int8):
            return tuple(F.linear(x, weight, bias) for weight, bias in self._layers)
        found = decode_linear(x, self.packed())
        return (found,) if isinstance(found, Tensor) else found

    def packed(self) -> PackedWeight:
        """All layers as one packed weight, which is kept."""
        if self._packed is None:
            weights, biases = [weight for weight, _ in self._layers], [bias for _, bias in self._layers]
            self._packed = prepack_weight(weights, biases, int8=self._int8)
        return self._packed

    def __call__(self, x: Tensor) -> Tensor:
        """Of a single layer."""
        return self.parts(x)[0]


class LayerWeights:
    """One decoder layer's projections.

    source: of the encoder's states, to keys and values. fc: (fc1, fc2) of each expert; None as a key where there are no
    experts.
    """

    def __init__(self, layer: DecoderLayer, int8: bool, pack: bool) -> None:
        def of(*modules: nn.Linear) -> Projection:
            return Projection.of(modules, int8, pack)

        own, cross = layer.self_attn, layer.encoder_attn
        self.own = of(own.q_proj, own.k_proj, own.v_proj)
        self.own_out = of(own.out_proj)
        self.cross = of(cross.q_proj)
        self.cross_out = of(cross.out_proj)
        # A bias of k adds the same to all scores of a query, and is left out.
        parts = [(cross.k_proj.weight, None), (cross.v_proj.weight, cross.v_proj.bias)]
        self.source = Projection(parts, False, pack)
        self.fc: dict[int | None, tuple[Projection, Projection]] = {None: (of(layer.fc1), of(layer.fc2))}
        if layer.experts_fc1 is not None and layer.experts_fc2 is not None:
            pairs = zip(layer.experts_fc1, layer.experts_fc2, strict=True)
            self.fc = {expert: (of(fc1), of(fc2)) for expert, (fc1, fc2) in enumerate(pairs)}  # type: ignore[arg-type]


class DecodeWeights:
    """All of a decoder's projections, and the output's `[V, D]`.

    packs, int8: how. by_layer, prepared: of `native.py`, why no step is one native call (once it has been asked), and
    what such calls multiply by, for each expert. rooms: of `graphs.py`.
    """

    def __init__(self, decoder: Decoder, output: Tensor, int8: bool = False, pack: bool = False) -> None:
        self.layers = [LayerWeights(layer, int8, pack) for layer in decoder.decoder_layers()]
        self.output = Projection([(output, None)], int8, pack)
        self._whole, self.int8, self.packs = output, int8, pack
        self.by_layer: str | None = None
        self.by_layer_asked = False
        self.prepared: dict[int | None, PreparedLayers] = {}
        self.rooms: list[Any] = []
        self._parts: dict[tuple[int, int], Projection] = {}

    def output_of(self, ids: tuple[int, int]) -> Projection:
        """The output's rows `ids[0] .. ids[1] - 1`, packed apart and kept for the next step."""
        if ids not in self._parts:
            if len(self._parts) == _RANGES:
                del self._parts[next(iter(self._parts))]
            self._parts[ids] = Projection([(self._whole[ids[0] : ids[1]], None)], self.int8, self.packs)
        return self._parts[ids]


def can_pack(weight: Tensor) -> bool:
    """Whether `decode_linear` has a kernel for such weights here."""
    return BACKENDS.unavailable["cpu"] is None and weight.device.type == "cpu" and weight.dtype in KERNEL_DTYPES


class WeightCache:
    """A model's `DecodeWeights`, made anew when a parameter has changed since.

    Changes are seen by torch's version counters and, since fused optimizers leave those alone, by a few values of every
    parameter. It is no part of the model's state: copies and pickles of a model begin with an empty one.
    """

    def __init__(self, kind: str | None = None) -> None:
        self._kind = kind
        self._weights: DecodeWeights | None = None
        self._seen: list[tuple[Tensor, int]] = []
        self._places: list[Tensor] = []
        self._values = torch.empty(0)

    @property
    def kind(self) -> str | None:
        return self._kind

    def quantize(self, kind: str | None, like: Tensor) -> None:
        """From now on weights of this kind. Raises OfakernValueError and, without a kernel, BackendError."""
        if kind not in QUANTIZATIONS:
            raise OfakernValueError(f"quantize: kind must be one of {list(QUANTIZATIONS)}, got {kind!r}")
        if kind is not None and not can_pack(like):
            reason = BACKENDS.unavailable["cpu"] or f"no kernel takes {like.dtype} weights on {like.device}"
            raise BackendError(f"quantize: kind {kind!r} cannot run here: {reason}")
        if kind != self._kind:
            self._kind = kind
            self.clear()

    def clear(self) -> None:
        if self._weights is not None:
            self._weights.rooms.clear()  # graphs know the weights: their memory would wait for Python's collector
        self._weights, self._seen, self._places, self._values = None, [], [], torch.empty(0)

    def of(self, decoder: Decoder, output: Tensor, keep: bool = True) -> DecodeWeights:
        """Under `torch.inference_mode`. keep: pack them and remember; else torch's own products on the parameters."""
        if not keep:
            return DecodeWeights(decoder, output)
        parameters = [*decoder.parameters(), output]
        if self._weights is None or not self._is_current(parameters):
            self._weights = DecodeWeights(decoder, output, self._kind == "int8", can_pack(output))
            # Aliases keep the storage, so that no other tensor can have its address while this one is compared with.
            self._seen = [(parameter.detach(), _version(parameter)) for parameter in parameters]
            self._places = [_some_places(parameter) for parameter, _ in self._seen]
            self._values = torch.cat(self._places)
        return self._weights

    def _is_current(self, parameters: Sequence[Tensor]) -> bool:
        return _unchanged(parameters, self._seen) and torch.equal(torch.cat(self._places), self._values)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightCache:
        return WeightCache(self._kind)

    def __reduce__(self) -> tuple[type[WeightCache], tuple[str | None]]:
        return WeightCache, (self._kind,)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _some_places(parameter: Tensor) -> Tensor:
    """A view of about `_VALUES` of the parameter's values; of one that is not contiguous, of its first part that is."""
    while not parameter.is_contiguous() and parameter.dim() > 1:
        parameter = parameter[0]
    flat = parameter.view(-1) if parameter.is_contiguous() else parameter
    return flat[:: max(1, flat.numel() // _VALUES)]


def _unchanged(parameters: Sequence[Tensor], seen: Sequence[tuple[Tensor, int]]) -> bool:
    return len(parameters) == len(seen) and all(
        now.data_ptr() == was.data_ptr() and now.dtype == was.dtype and _version(now) == version
        for now, (was, version) in zip(parameters, seen, strict=True)
    )

"""All layers of a decoder over one token of every row, in one call; csrc/ops/decode_layers/README.md derives it."""

from ofakern.ops.decode_layers.api import LayerParts, PreparedLayers, StepNorm, decode_layers, prepare_layers

__all__ = ["LayerParts", "PreparedLayers", "StepNorm", "decode_layers", "prepare_layers"]

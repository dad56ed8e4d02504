"""Linear layers of a few rows on prepacked weights; csrc/ops/decode_linear/README.md has layout and measurements."""

from ofakern.ops.decode_linear.api import PackedWeight, decode_linear, prepack_weight

__all__ = ["PackedWeight", "decode_linear", "prepack_weight"]

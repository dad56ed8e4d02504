"""One query token per row against keys stored once; csrc/ops/decode_attention/README.md has layout and measurements."""

from ofakern.ops.decode_attention.api import decode_attention
from ofakern.ops.decode_attention.cache import KeyValueCache

__all__ = ["KeyValueCache", "decode_attention"]

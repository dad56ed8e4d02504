"""Feed-forward layers whose tokens are routed to experts; csrc/ops/routed_ffn/README.md has layout and measurements."""

from ofakern.ops.routed_ffn.api import routed_ffn, routed_linear

__all__ = ["routed_ffn", "routed_linear"]

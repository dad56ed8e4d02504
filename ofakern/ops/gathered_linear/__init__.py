"""Only the output rows a closed set still allows; csrc/ops/gathered_linear/README.md has layout and measurements."""

from ofakern.ops.gathered_linear.api import gathered_linear

__all__ = ["gathered_linear"]

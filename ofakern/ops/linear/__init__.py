"""torch's linear layer with its weight's and bias' gradient in one pass; csrc/ops/linear/README.md has the maths."""

from ofakern.ops.linear.api import linear

__all__ = ["linear"]

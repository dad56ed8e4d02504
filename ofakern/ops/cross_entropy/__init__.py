"""Label-smoothed cross entropy fused with the output projection; csrc/ops/cross_entropy/README.md has the maths."""

from ofakern.ops.cross_entropy.api import AllowedIds, CrossEntropy, cross_entropy
from ofakern.ops.cross_entropy.reference import IGNORED

__all__ = ["IGNORED", "AllowedIds", "CrossEntropy", "cross_entropy"]

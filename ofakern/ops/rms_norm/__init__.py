"""Root-mean-square norm; csrc/ops/rms_norm/README.md has the maths and the measurements."""

from ofakern.ops.rms_norm.api import rms_norm

__all__ = ["rms_norm"]

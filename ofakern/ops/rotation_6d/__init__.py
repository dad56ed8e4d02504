"""Six numbers to a rotation matrix and back; csrc/ops/rotation_6d/README.md has the maths and the measurements."""

from ofakern.ops.rotation_6d.api import rotation_6d, rotation_6d_of

__all__ = ["rotation_6d", "rotation_6d_of"]

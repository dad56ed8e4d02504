"""The ops: one room each. Importing this registers their schemas."""

from ofakern.ops.registry import backends, explain, ops

__all__ = ["backends", "explain", "ops"]

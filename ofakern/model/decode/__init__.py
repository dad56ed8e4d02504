"""Incremental decoding: one token per row and step, over a cache whose rows are written once and never moved."""

from ofakern.model.decode.segment import SegmentKind
from ofakern.model.decode.state import DecodeState
from ofakern.model.decode.weights import WeightCache

__all__ = ["DecodeState", "SegmentKind", "WeightCache"]

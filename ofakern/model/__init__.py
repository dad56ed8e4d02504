"""OFA+: the generalist encoder-decoder. It knows no vocabulary, instruction or loss."""

from ofakern.model.config import OFAConfig
from ofakern.model.decode import DecodeState
from ofakern.model.ofa_plus import TIED_KEYS, FrameWriter, OFAPlus, SegmentWriter
from ofakern.model.stacks import Memory

__all__ = ["TIED_KEYS", "DecodeState", "FrameWriter", "Memory", "OFAConfig", "OFAPlus", "SegmentWriter"]

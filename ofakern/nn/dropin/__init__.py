"""Layers that take the place of other libraries' attention: README.md in `ofakern/nn` lists what replaces what."""

from ofakern.nn.dropin.base import CannotReplace, DropIn
from ofakern.nn.dropin.t5 import T5Attention, UMT5Attention

__all__ = ["CannotReplace", "DropIn", "T5Attention", "UMT5Attention"]

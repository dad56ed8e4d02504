"""Layers that take the place of other libraries' attention: README.md in `ofakern/nn` lists what replaces what."""

from ofakern.nn.dropin.alibi import BloomAttention, MptAttention
from ofakern.nn.dropin.base import CannotReplace, DropIn
from ofakern.nn.dropin.beit import BeitAttention, BeitRelativePositionBias, TimmBeitAttention
from ofakern.nn.dropin.patches import PatchEmbed, PatchEmbeddings, SwinPatchEmbeddings
from ofakern.nn.dropin.rms_norm import T5LayerNorm
from ofakern.nn.dropin.swin import SwinAttention
from ofakern.nn.dropin.t5 import T5Attention, UMT5Attention
from ofakern.nn.dropin.torch_attention import MultiheadAttention

__all__ = [
    "BeitAttention",
    "BeitRelativePositionBias",
    "BloomAttention",
    "CannotReplace",
    "DropIn",
    "MptAttention",
    "MultiheadAttention",
    "PatchEmbed",
    "PatchEmbeddings",
    "SwinAttention",
    "SwinPatchEmbeddings",
    "T5Attention",
    "T5LayerNorm",
    "TimmBeitAttention",
    "UMT5Attention",
]

"""Layers built on the ops: attention on packed tokens, NormFormer layers, relative-position blocks, losses.

The names here are the drop-in layers (README.md lists them); the packed layers of our own model are in the modules.
"""

from ofakern.nn.dropin import (
    BeitAttention,
    BeitRelativePositionBias,
    BloomAttention,
    CannotReplace,
    MptAttention,
    MultiheadAttention,
    PatchEmbed,
    PatchEmbeddings,
    SwinAttention,
    SwinPatchEmbeddings,
    T5Attention,
    T5LayerNorm,
    TimmBeitAttention,
    UMT5Attention,
)
from ofakern.nn.dropin.ofa import FairseqMultiheadAttention, OFAAttention
from ofakern.nn.dropin.ofa_layers import OFADecoderLayer, OFAEncoderLayer, OFASysDecoderLayer, OFASysEncoderLayer
from ofakern.nn.dropin.patches import PatchConv2d
from ofakern.nn.dropin.positions import OFAPositions, PositionBias
from ofakern.nn.linear import Linear

__all__ = [
    "BeitAttention",
    "BeitRelativePositionBias",
    "BloomAttention",
    "CannotReplace",
    "FairseqMultiheadAttention",
    "Linear",
    "MptAttention",
    "MultiheadAttention",
    "OFAAttention",
    "OFADecoderLayer",
    "OFAEncoderLayer",
    "OFAPositions",
    "OFASysDecoderLayer",
    "OFASysEncoderLayer",
    "PatchConv2d",
    "PatchEmbed",
    "PatchEmbeddings",
    "PositionBias",
    "SwinAttention",
    "SwinPatchEmbeddings",
    "T5Attention",
    "T5LayerNorm",
    "TimmBeitAttention",
    "UMT5Attention",
]

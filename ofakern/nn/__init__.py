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
    SwinAttention,
    T5Attention,
    TimmBeitAttention,
    UMT5Attention,
)

__all__ = [
    "BeitAttention",
    "BeitRelativePositionBias",
    "BloomAttention",
    "CannotReplace",
    "MptAttention",
    "MultiheadAttention",
    "SwinAttention",
    "T5Attention",
    "TimmBeitAttention",
    "UMT5Attention",
]

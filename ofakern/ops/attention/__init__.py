"""Attention with structured position bias; README.md here has the formula, the dropout bits and the backends."""

from ofakern.ops.attention import intervals
from ofakern.ops.attention.api import attention
from ofakern.ops.attention.intervals import intervals_from_mask
from ofakern.ops.attention.layout import AttentionLayout, RelativeTerm
from ofakern.ops.attention.padded import padded_layout, scaled_dot_product_attention
from ofakern.ops.attention.shared import SharedPositions, same_prefixes

__all__ = [
    "AttentionLayout",
    "RelativeTerm",
    "SharedPositions",
    "attention",
    "intervals",
    "intervals_from_mask",
    "padded_layout",
    "same_prefixes",
    "scaled_dot_product_attention",
]

"""Which backend runs a call of `attention`: every op's table, and what the kernels' widths may be."""

from __future__ import annotations

from torch import Tensor

from ofakern.ops.selection import Backends

BACKENDS = Backends("attention", "attention_forward", triton=True)


def limit(q: Tensor, v: Tensor, q_pos: Tensor | None) -> str | None:
    """What no kernel can do of a checked call, or None."""
    widths = {"K": q.shape[2], "V": v.shape[2]} | ({} if q_pos is None else {"P": q_pos.shape[2]})
    for letter, width in widths.items():
        if width % 8 or not 8 <= width <= 256:
            return f"takes widths that are multiples of 8 up to 256, got {letter} = {width}"
    return None

"""FlashAttention-2 (the `flash-attn` package) as a backend: calls without relative terms, ragged batches as they are.

The factored term is its dot product of (q, q_pos) and (k, k_pos), v padded to the same width. Masks are what
`flash_attn_varlen_func` knows: every query of a sample sees all of its keys, or a window around the diagonal that ends
at the sample's last query and key. Not yet run on a GPU: tested against a stand-in of the same signature.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ofakern.ops.attention.layout import AttentionLayout

DTYPES = (torch.bfloat16, torch.float16)
_WIDEST = 256
_KEPT = "_flash_window"  # where a layout keeps what was recognised in it


class Window(NamedTuple):
    """Query l of a sample with n queries and m keys sees keys `l + m - n - left .. l + m - n + right`; -1: no end.

    longest_q, longest_k: the most queries and keys of a sample.
    """

    left: int
    right: int
    longest_q: int
    longest_k: int


def unavailable() -> str | None:
    """Why flash-attn cannot run here, or None."""
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed. Try: pip install 'ofakern[flash]'"
    if not torch.cuda.is_available():
        return "flash-attn needs a GPU, and torch sees none here"
    return None


def limit(call: Any, return_lse: bool) -> str | None:
    """What flash-attn cannot do of a checked call of `attention`, or None."""
    if call.tables:
        return "flash-attn has no relative terms"
    if call.dropout_p:
        return "flash-attn draws its dropout otherwise: the same seed gives another mask"
    if return_lse:
        return "flash-attn's log-sum-exp has no gradient"
    position = 0 if call.q_pos is None else call.q_pos.shape[2]
    if max(call.q.shape[2] + position, call.v.shape[2]) > _WIDEST:
        widths = f"K + P = {call.q.shape[2] + position}, V = {call.v.shape[2]}"
        return f"flash-attn takes widths up to {_WIDEST}, got {widths}"
    if torch.compiler.is_compiling():
        return "flash-attn's masks are recognised outside of compiled graphs"
    if window_of(call.layout) is None:
        return "flash-attn's masks are full, causal or a window, the same for all samples; this layout's are others"
    return None


def run(call: Any) -> Tensor:
    """`[Nq,H,V]` of a call that `limit` has let pass; gradients are flash-attn's, deterministic."""
    from flash_attn import flash_attn_varlen_func

    window = window_of(call.layout)
    assert window is not None
    q, k, v, layout = call.q, call.k, call.v, call.layout
    q_pos, k_pos = call.q_pos, call.k_pos
    if q_pos is not None and layout.shared is not None:
        q_pos, k_pos = layout.shared.spelled_out(q_pos, k_pos)
    if q_pos is not None:
        q, k = torch.cat([q, q_pos], -1), torch.cat([k, k_pos], -1)
    width, values = max(q.shape[2], v.shape[2]), v.shape[2]
    q, k, v = (F.pad(x, (0, width - x.shape[2])) if x.shape[2] < width else x for x in (q, k, v))
    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=layout.q_offsets,
        cu_seqlens_k=layout.k_offsets,
        max_seqlen_q=window.longest_q,
        max_seqlen_k=window.longest_k,
        softmax_scale=call.scale,
        causal=window.right == 0,
        window_size=(window.left, window.right),
        deterministic=True,
    )
    out = out[..., :values]
    return out if call.head_scale is None else (out * call.head_scale[:, None]).to(out.dtype)


def window_of(layout: AttentionLayout) -> Window | None:
    """The layout's mask as flash-attn has it, or None. Read on the CPU once per layout, then kept with it: layers share
    one layout, so a batch on a GPU waits for it once."""
    if _KEPT not in layout.__dict__:
        offsets = layout.q_offsets.cpu().numpy(), layout.k_offsets.cpu().numpy()
        # Frozen: what is kept follows from the fields.
        object.__setattr__(layout, _KEPT, recognise(layout.visible.cpu().numpy(), *offsets))
    found: Window | None = layout.__dict__[_KEPT]
    return found


def recognise(visible: np.ndarray, q_offsets: np.ndarray, k_offsets: np.ndarray) -> Window | None:
    """visible `[Nq,2]`, offsets `[B+1]`: the one window that gives these intervals, or None."""
    q_counts, k_counts = np.diff(q_offsets), np.diff(k_offsets)
    longest = int(q_counts.max(initial=0)), int(k_counts.max(initial=0))
    first, last = np.repeat(k_offsets[:-1], q_counts), np.repeat(k_offsets[1:], q_counts)
    # The key on the diagonal through a sample's last query and last key.
    shift = k_offsets[:-1] - q_offsets[:-1] + k_counts - q_counts
    diagonal = np.arange(len(visible)) + np.repeat(shift, q_counts)
    lo, hi = visible[:, 0], visible[:, 1]
    busy = hi > lo
    begun, ended = busy & (lo > first), busy & (hi < last)
    left = int((diagonal - lo)[begun][0]) if begun.any() else -1
    right = int((hi - 1 - diagonal)[ended][0]) if ended.any() else -1
    if (begun.any() and left < 0) or (ended.any() and right < 0):
        return None
    want_lo = first if left < 0 else np.maximum(first, diagonal - left)
    want_hi = last if right < 0 else np.minimum(last, diagonal + right + 1)
    same = (lo == want_lo) & (hi == want_hi)
    if not np.where(busy, same, want_hi <= want_lo).all():
        return None
    return Window(left, right, *longest)

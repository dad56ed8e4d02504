"""The oracle of `decode_attention`: one query token per row, keys in runs or found through a table of slots."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 `[N,H,K]` and float32 `[N,H]` with x ~ int8 * scale: the largest magnitude of a row's head becomes 127."""
    largest = x.abs().amax(dim=2).float()
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return torch.round(x.float() / scale[..., None]).clamp_(-127, 127).to(torch.int8), scale


def decode_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_offsets: Tensor,
    counts: Tensor,
    *,
    first: Tensor | None = None,
    slots: Tensor | None = None,
    bias: Tensor | None = None,
    head_scale: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out `[R,H,Kv]` in q's dtype and lse `[R,H]` in at least float32 (natural, -inf for a row without keys).

    q `[R,H,K]`; k `[S,H,K]`, v `[S,H,Kv]`: slots. Rows row_offsets[b]..row_offsets[b+1] belong to sample b, which has
    counts[b] keys: slots first[b], first[b] + 1, ... for all of its rows, or slots[r, 0], slots[r, 1], ... for row r.
    bias `[H, sum of counts]` is added to scale * q.k of every row of the sample; head_scale `[H]` multiplies out.
    """
    with torch.autocast(q.device.type, enabled=False):
        stat = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros((*q.shape[:2], v.shape[2]))
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=stat)
        seen = 0
        for b, count in enumerate(counts.tolist()):
            own_bias = None if bias is None else bias[:, seen : seen + count].to(stat)
            seen += count
            for r in range(int(row_offsets[b]), int(row_offsets[b + 1])) if count else ():
                if slots is not None:
                    found = slots[r, :count].long()
                elif first is not None:
                    found = torch.arange(int(first[b]), int(first[b]) + count, device=q.device)
                else:
                    raise ValueError("decode_attention_reference: first or slots must be given, got neither")
                scores = scale * torch.einsum("hk,jhk->hj", q[r], k[found]).to(stat)
                scores = scores if own_bias is None else scores + own_bias
                lse[r] = torch.logsumexp(scores, dim=1)
                reference = torch.where(torch.isneginf(lse[r]), 0.0, lse[r])
                weights = torch.exp(scores - reference[:, None])
                row = torch.einsum("hj,jhv->hv", weights, v[found].to(stat))
                out[r] = (row if head_scale is None else row * head_scale.to(stat)[:, None]).to(q.dtype)
        return out, lse

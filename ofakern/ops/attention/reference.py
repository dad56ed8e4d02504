"""The oracle of `attention` in plain torch. The contract: csrc/ops/attention/attention.h; the formula: README.md here.

Works in any float dtype (statistics in at least float32), differentiates through autograd any number of times, and
needs O(H * Nq * Nk) memory. It imports nothing of ours, so that no kernel can bend it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_OFFSET_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # the same 64 bits as a signed number


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    *,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    q_index: Tensor | None = None,
    k_index: Tensor | None = None,
    terms: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]] = (),
    head_scale: Tensor | None = None,
    scale: float,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over packed tokens with position bias.

    q `[Nq,H,K]`, k `[Nk,Hk,K]`, v `[Nk,Hk,V]`, q_pos `[Nq,H,P]`, k_pos `[Nk,Hk,P]`, visible int `[Nq,2]`,
    q_index int `[Nq]`, k_index int `[Nk]`: the rows that tokens take of q_pos and k_pos, where not each its own,
    terms `(table [H,R], q_coord int [Nq], k_coord int [Nk], same int [Nq,2])`, head_scale `[H]`,
    dropout_seed int64 `[2]` (seed, offset). Returns out `[Nq,H,V]` in q's dtype and lse `[Nq,H]` in the dtype of
    the statistics.
    """
    with torch.autocast(q.device.type, enabled=False):
        stat = torch.promote_types(q.dtype, torch.float32)
        group = q.shape[1] // k.shape[1]
        allowed = _inside(visible, k.shape[0])  # [Nq,Nk]
        has_key = (visible[:, 1] > visible[:, 0])[:, None]  # [Nq,1]
        seen = _seen(visible, k.shape[0])

        scores = scale * _dots(q, k, has_key, seen, group, stat)  # [H,Nq,Nk]
        if q_pos is not None and k_pos is not None:
            q_pos = q_pos if q_index is None else q_pos[q_index.long()]
            k_pos = k_pos if k_index is None else k_pos[k_index.long()]
            scores = scores + scale * _dots(q_pos, k_pos, has_key, seen, group, stat)
        for table, q_coord, k_coord, same in terms:
            scores = scores + _relative(table.to(stat), q_coord, k_coord, allowed & _inside(same, k.shape[0]))

        scores = scores.masked_fill(~allowed, -torch.inf)
        top = _row_max(scores, has_key)
        weights = torch.exp(scores - top[..., None])
        total = torch.where(has_key.T, weights.sum(-1), 1.0)  # [H,Nq]
        lse = torch.where(has_key.T, top + torch.log(total), -torch.inf).T

        probs = weights / total[..., None]
        if dropout_p > 0.0:
            if dropout_seed is None:
                raise ValueError("attention_reference: dropout_seed must be given when dropout_p > 0, got None")
            keep = dropout_keep(dropout_seed, dropout_p, q.shape[1], q_offsets, k_offsets, k.shape[0], q.shape[0])
            probs = torch.where(keep, probs * (1.0 / (1.0 - dropout_p)), 0.0)
        values = _guard(v.to(stat), seen[:, None, None]).repeat_interleave(group, dim=1)
        out = torch.einsum("hij,jhv->ihv", probs, values)
        if head_scale is not None:
            out = out * head_scale.to(stat)[None, :, None]
        out = torch.where(has_key[..., None], out, 0.0)  # drops the incoming gradient of rows without keys, too
        return out.to(q.dtype), lse


def dropout_keep(
    dropout_seed: Tensor,
    dropout_p: float,
    heads: int,
    q_offsets: Tensor,
    k_offsets: Tensor,
    keys: int,
    queries: int | None = None,
) -> Tensor:
    """bool `[H,Nq,Nk]`: which probabilities survive. The exact bits are specified in README.md beside this file.

    queries: Nq; None: read from q_offsets, for which a GPU is waited for.
    """
    device = q_offsets.device
    queries = int(q_offsets[-1]) if queries is None else queries
    i = torch.arange(queries, device=device)
    sample = torch.searchsorted(q_offsets.long(), i, right=True) - 1
    i_local = i - q_offsets.long()[sample]
    j_local = (torch.arange(keys, device=device) - k_offsets.long()[sample][:, None]) & _WORD  # [Nq,Nk]
    head = torch.arange(heads, device=device)[:, None, None]
    key = dropout_seed[0] + dropout_seed[1] * _OFFSET_MULTIPLIER  # int64 wraps: arithmetic modulo 2^64
    words = philox4x32((j_local >> 2, i_local[:, None], head, sample[:, None]), (key & _WORD, (key >> 32) & _WORD))
    lane = (j_local & 3).expand_as(words[0])
    word = torch.stack(words, dim=-1).gather(-1, lane[..., None]).squeeze(-1)
    threshold = min(int(dropout_p * 2.0**32 + 0.5), _WORD)
    return word >= threshold


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words (broadcast together); four words per counter."""
    shape = torch.broadcast_shapes(*(word.shape for word in counter))  # type: ignore[no-untyped-call]
    c0, c1, c2, c3 = (word.expand(shape) for word in counter)
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps like uint64
        c0, c1, c2, c3 = (
            ((b >> 32) & _WORD) ^ c1 ^ k0,
            b & _WORD,
            ((a >> 32) & _WORD) ^ c3 ^ k1,
            a & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _inside(interval: Tensor, keys: int) -> Tensor:
    j = torch.arange(keys, device=interval.device)
    return (interval[:, :1] <= j) & (j < interval[:, 1:])


def _seen(visible: Tensor, keys: int) -> Tensor:
    """bool `[Nk]` without an `[Nq,Nk]` reduction, so that it also serves Nq = 0."""
    used = visible.long() * (visible[:, 1:] > visible[:, :1])  # empty intervals become (0, 0), which cancels
    steps = torch.zeros(keys + 1, dtype=torch.long, device=visible.device)
    steps.index_add_(0, used[:, 0], torch.ones_like(used[:, 0]))
    steps.index_add_(0, used[:, 1], -torch.ones_like(used[:, 1]))
    return steps.cumsum(0)[:keys] > 0


def _guard(x: Tensor, keep: Tensor) -> Tensor:
    # 0 * NaN is NaN: what must not be read is replaced before any product, not masked after it.
    return torch.where(keep, x, 0.0)


def _dots(a: Tensor, b: Tensor, has_key: Tensor, seen: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    a = _guard(a.to(dtype), has_key[..., None])
    b = _guard(b.to(dtype), seen[:, None, None]).repeat_interleave(group, dim=1)
    return torch.einsum("ihk,jhk->hij", a, b)


def _relative(table: Tensor, q_coord: Tensor, k_coord: Tensor, active: Tensor) -> Tensor:
    if table.shape[1] == 0:  # a table without rows is allowed when no pair reads it
        return table.new_zeros(())
    rows = torch.where(active, q_coord.long()[:, None] - k_coord.long()[None, :], 0)
    bias = table.index_select(1, rows.flatten()).view(table.shape[0], *rows.shape)
    return torch.where(active, bias, 0.0)


def _row_max(scores: Tensor, has_key: Tensor) -> Tensor:
    if scores.shape[-1] == 0:
        return scores.new_zeros(scores.shape[:-1])
    return torch.where(has_key.T, scores.detach().amax(-1), 0.0)

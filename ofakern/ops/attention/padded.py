"""The padded front door: `[B,H,T,K]` tensors under the names of torch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.ops.attention.api import attention
from ofakern.ops.attention.intervals import Lengths, as_lengths, intervals_from_mask
from ofakern.ops.attention.layout import AttentionLayout, RelativeTerm

_WHERE = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    tables: Sequence[Tensor] = (),
    terms: Sequence[RelativeTerm] = (),
    head_scale: Tensor | None = None,
    key_lengths: Lengths | None = None,
    layout: AttentionLayout | None = None,
    dropout_seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`attention` for padded batches, with the arguments of `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: `[B,H,T,K]`; key `[B,Hk,S,K]`; value `[B,Hk,S,V]`. Hk other than H needs enable_gqa, as in torch.
        attn_mask: bool, broadcastable to `[B,H,T,S]`, True where the key takes part; every row one run of keys, equal
            for all heads. Float masks are refused: a bias goes into terms and tables or q_pos and k_pos, where it
            costs no T x S matrix.
        is_causal: query i sees keys `j <= i`. key_lengths: real keys per sample, the rest of S is padding.
        q_pos: `[B,H,T,P]`, k_pos: `[B,Hk,S,P]`, tables, head_scale, backend, dropout_seed: as in `attention`.
        terms: one per table, in positions within a sample: q_coord int32 `[T]` or `[B,T]`, k_coord `[S]` or `[B,S]`,
            same `[T,2]` or `[B,T,2]`.
        layout: a layout of B samples of T queries and S keys, instead of attn_mask, is_causal, key_lengths and terms.
            Building one copies masks to the CPU and validates: build it once with `padded_layout` and share it between
            layers (and under `torch.compile(fullgraph=True)`).

    Returns:
        `[B,H,T,V]` in query's dtype. A query that sees no key gives 0 (torch gives NaN).

    Raises:
        OfakernTypeError, OfakernValueError: wrong types and shapes, a float mask, a mask whose rows are not one run of
            keys, layout given beside what it replaces. BackendError: as `attention`.
    """
    _check_padded(query, key, value, q_pos, k_pos, enable_gqa)
    batch, _, length, _ = query.shape
    if layout is None:
        layout = padded_layout(
            batch, length, key.shape[2], attn_mask=attn_mask, is_causal=is_causal, key_lengths=key_lengths, terms=terms
        ).to(query.device)
    elif attn_mask is not None or is_causal or key_lengths is not None or terms:
        raise OfakernValueError(
            f"{_WHERE}: layout must come without attn_mask, is_causal, key_lengths and terms, got both"
        )
    out = attention(
        _pack(query),
        _pack(key),
        _pack(value),
        layout,
        q_pos=None if q_pos is None else _pack(q_pos),
        k_pos=None if k_pos is None else _pack(k_pos),
        tables=tables,
        head_scale=head_scale,
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        backend=backend,
    )
    return out.view(batch, length, *out.shape[1:]).transpose(1, 2)


def padded_layout(
    batch: int,
    queries: int,
    keys: int,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    key_lengths: Lengths | None = None,
    terms: Sequence[RelativeTerm] = (),
) -> AttentionLayout:
    """The layout, on the CPU, of a padded batch, for `scaled_dot_product_attention(..., layout=layout.to(device))`.

    batch, queries, keys: B, T and S. attn_mask, is_causal, key_lengths, terms and errors: as there.
    """
    if attn_mask is None and key_lengths is None and not terms:
        return _plain_layout(batch, queries, keys, is_causal)
    if attn_mask is not None:
        if is_causal:
            raise OfakernValueError(f"{_WHERE}: attn_mask must be None when is_causal is set, got both")
        visible = _mask_intervals(attn_mask, batch, queries, keys)
    else:
        visible = _intervals(batch, queries, keys, is_causal)
    if key_lengths is not None:
        visible = _cut(visible, as_lengths(_WHERE, "key_lengths", key_lengths, samples=batch), queries, keys)
    packed = [_pack_term(f"terms[{n}]", term, batch, queries, keys) for n, term in enumerate(terms)]
    return AttentionLayout.build(torch.from_numpy(visible), [queries] * batch, [keys] * batch, packed)


@lru_cache(maxsize=16)
def _plain_layout(batch: int, queries: int, keys: int, is_causal: bool) -> AttentionLayout:
    visible = torch.from_numpy(_intervals(batch, queries, keys, is_causal))
    return AttentionLayout.build(visible, [queries] * batch, [keys] * batch)


def _intervals(batch: int, queries: int, keys: int, is_causal: bool) -> np.ndarray:
    start = np.arange(batch)[:, None] * keys
    width = np.minimum(np.arange(queries) + 1, keys) if is_causal else np.full(queries, keys)
    intervals: np.ndarray = np.stack(np.broadcast_arrays(start, start + width), axis=-1)
    return intervals.reshape(-1, 2).astype(np.int32)


def _mask_intervals(mask: Tensor, batch: int, queries: int, keys: int) -> np.ndarray:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise OfakernTypeError(
            f"{_WHERE}: attn_mask must be a bool tensor, got {got}\n"
            "Try: mask > threshold for a mask of 0 and -inf; a bias as terms and tables, or as q_pos and k_pos."
        )
    shape = (batch, 1, queries, keys) if mask.ndim < 4 or mask.shape[1] == 1 else (batch, mask.shape[1], queries, keys)
    try:
        mask = mask.expand(shape)
    except RuntimeError as error:
        raise OfakernValueError(
            f"{_WHERE}: attn_mask must be broadcastable to [B={batch},H,T={queries},S={keys}], got {list(mask.shape)}"
        ) from error
    return intervals_from_mask(mask).numpy()


def _cut(visible: np.ndarray, counts: np.ndarray, queries: int, keys: int) -> np.ndarray:
    if (counts > keys).any():
        raise OfakernValueError(f"{_WHERE}: key_lengths must be at most S = {keys}, got {int(counts.max())}")
    end = np.repeat(np.arange(len(counts)) * keys + counts, queries)
    hi = np.minimum(visible[:, 1], end)
    lo = np.minimum(visible[:, 0], hi)
    return np.stack([lo, hi], axis=1).astype(np.int32)


def _pack_term(name: str, term: RelativeTerm, batch: int, queries: int, keys: int) -> RelativeTerm:
    same = _per_sample(f"{name}.same", term.same, batch, (queries, 2))
    shift = torch.arange(batch, dtype=torch.int32)[:, None, None] * keys
    lo, hi = same[..., 0], same[..., 1]
    if bool(((lo < 0) | (hi > keys) | (lo > hi)).any()):  # a shifted interval could lie inside another sample
        raise OfakernValueError(
            f"{_WHERE}: {name}.same must satisfy 0 <= lo <= hi <= S = {keys}, got one that does not"
        )
    return RelativeTerm(
        _per_sample(f"{name}.q_coord", term.q_coord, batch, (queries,)).reshape(-1),
        _per_sample(f"{name}.k_coord", term.k_coord, batch, (keys,)).reshape(-1),
        (same + shift).reshape(-1, 2),
        term.rows,
    )


def _per_sample(name: str, tensor: Tensor, batch: int, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise OfakernTypeError(f"{_WHERE}: {name} must be an int32 tensor, got {got}")
    if tuple(tensor.shape) not in (shape, (batch, *shape)):
        raise OfakernValueError(
            f"{_WHERE}: {name} must have shape {list(shape)} or {[batch, *shape]}, got {list(tensor.shape)}"
        )
    return tensor.expand(batch, *shape)


def _check_padded(
    query: Tensor, key: Tensor, value: Tensor, q_pos: Tensor | None, k_pos: Tensor | None, enable_gqa: bool
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value), ("q_pos", q_pos), ("k_pos", k_pos)):
        if tensor is None and name in ("q_pos", "k_pos"):
            continue
        if not isinstance(tensor, Tensor):
            raise OfakernTypeError(f"{_WHERE}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise OfakernValueError(
                f"{_WHERE}: {name} must have 4 dimensions [B,H,T,K], got shape {list(tensor.shape)}"
            )
        tokens = query if name == "q_pos" else key
        if name not in ("query", "key") and (tensor.shape[0], tensor.shape[2]) != (tokens.shape[0], tokens.shape[2]):
            other = "query" if name == "q_pos" else "key"
            raise OfakernValueError(
                f"{_WHERE}: {name} must have {other}'s B and length ({tokens.shape[0]}, {tokens.shape[2]}), "
                f"got {list(tensor.shape)}"
            )
    if key.shape[0] != query.shape[0]:
        raise OfakernValueError(f"{_WHERE}: key must have query's B = {query.shape[0]}, got {list(key.shape)}")
    if key.shape[1] != query.shape[1] and not enable_gqa:
        raise OfakernValueError(
            f"{_WHERE}: key must have query's heads ({query.shape[1]}), got {key.shape[1]}\nTry: enable_gqa=True"
        )


def _pack(x: Tensor) -> Tensor:
    """`[B,H,T,K]` to `[B*T,H,K]`: a view when x is a transposed `[B,T,H,K]`, else a copy."""
    return x.transpose(1, 2).flatten(0, 1)

"""The public door of attention: every argument is checked here. The room's other half: csrc/ops/attention/."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.ops import log
from ofakern.ops.attention import flash, op
from ofakern.ops.attention.backends import BACKENDS, cuda_limit, limit
from ofakern.ops.attention.layout import AttentionLayout
from ofakern.ops.attention.reference import attention_reference
from ofakern.ops.library import autocast, draw_seed, straight

_WHERE = "attention"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_logger = logging.getLogger("ofakern.ops.attention")


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    q_pos: Tensor | None = ...,
    k_pos: Tensor | None = ...,
    tables: Sequence[Tensor] = ...,
    head_scale: Tensor | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    q_pos: Tensor | None = ...,
    k_pos: Tensor | None = ...,
    tables: Sequence[Tensor] = ...,
    head_scale: Tensor | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    *,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    tables: Sequence[Tensor] = (),
    head_scale: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with structured position bias over packed tokens.

    ::

        score[h,i,j] = scale * (q[i,h].k[j,g] + q_pos[i,h].k_pos[j,g]) + sum_t tables[t][h, q_coord_t[i] - k_coord_t[j]]
        out[i,h]     = head_scale[h] * sum_j dropout(softmax_j(score))[j] * v[j,g]             g = h // (H // Hk)

    Args:
        q: `[Nq,H,K]`; all samples' queries end to end. float32, bfloat16, float16 (float64 on the reference).
        k: `[Nk,Hk,K]`, v: `[Nk,Hk,V]`; Hk divides H. A key that no query sees is never read.
        layout: intervals, coordinates and samples of the batch; on q's device.
        q_pos: `[Nq,H,P]`, k_pos: `[Nk,Hk,P]`: the factored absolute term, both or neither, in q's dtype. Where the
            layout says that samples share positions (`layout.shared`), they have its q_rows and k_rows instead.
        tables: one `[H,R]` per term of the layout, R its `rows`; taken to float32 (float64 beside float64 q).
        head_scale: `[H]`; taken to float32 like the tables.
        scale: of both dot products; `K**-0.5` when None.
        dropout_p: in [0,1), of the probabilities. dropout_seed: int64 `[2]` (seed, offset); drawn from torch's default
            generator when None. Equal seeds give equal masks on every backend.
        return_lse: also return the log-sum-exp `[Nq,H]`: natural, float32 (float64 beside float64 q), differentiable,
            -inf for a query without keys.
        backend: "auto", "cpu", "cuda", "triton", "flash" (the flash-attn package: calls without tables, dropout or
            log-sum-exp; keys that nobody sees must be finite) or "reference" (plain torch, O(H*Nq*Nk) memory). Never
            falls back.

    Returns:
        out `[Nq,H,V]` in q's dtype, 0 for a query without keys; with return_lse the pair (out, lse).

    Under autocast q, k, v, q_pos and k_pos take the autocast dtype. Each gradient has its argument's dtype.

    Raises:
        OfakernTypeError, OfakernValueError: an argument of the wrong type, dtype, device, shape or range.
        BackendError: the backend cannot run the call, with the reason.
        OfakernRuntimeError: a second derivative, or vmap (both work with backend="reference").

    Source: the factored term is TUPE's (Ke et al., arXiv 2006.15595), the relative terms cover T5's buckets
    (arXiv 1910.10683), ALiBi (arXiv 2108.12409), BEiT, Swin and OFA; the algorithm is the online softmax of
    FlashAttention (arXiv 2205.14135).
    """
    if straight(backend) and not torch._C._is_any_autocast_enabled():
        made = op.run_straight(
            q, k, v, layout, q_pos, k_pos, tables, head_scale, scale, dropout_p, dropout_seed, bool(return_lse)
        )
        if made is not None:
            return made
        # Refused: the checks below say why, or cast what can be cast.
    call = _check(q, k, v, layout, q_pos, k_pos, tables, head_scale, scale, dropout_p, dropout_seed)
    chosen = BACKENDS.select(backend, call.q, _limit(backend, call, return_lse))
    if log.ENABLED and not torch.compiler.is_compiling():
        log.once(_logger, _describe(call, chosen))
    if chosen == "flash":
        return flash.run(call)
    out, lse = _run_reference(call) if chosen == "reference" else _run_op(chosen, call)
    return (out, lse) if return_lse else out


def refusals(*args: object, **kwargs: object) -> tuple[str, dict[str, str | None]]:
    """The backend that `attention(*args, **kwargs)` asks for, and each one's reason against the call (None: it can)."""
    bound = _signature.bind(*args, **kwargs)
    bound.apply_defaults()
    values = dict(bound.arguments)
    return_lse = bool(values.pop("return_lse"))
    backend = values.pop("backend")
    call = _check(**values)
    wanted, reasons = BACKENDS.reasons(str(backend), call.q, _limit("", call, return_lse))
    if reasons["flash"] == _limit("", call, return_lse):  # nothing but the other kernels' limit stands against it
        reasons["flash"] = BACKENDS.refusal("flash", call.q, _limit("flash", call, return_lse))
    reasons["cuda"] = BACKENDS.refusal("cuda", call.q, _limit("cuda", call, return_lse))
    return wanted, reasons


class _Call(NamedTuple):
    """A checked call: casts done, defaults filled in."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: AttentionLayout
    q_pos: Tensor | None
    k_pos: Tensor | None
    tables: Sequence[Tensor]
    head_scale: Tensor | None
    scale: float
    dropout_p: float
    dropout_seed: Tensor | None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    tables: Sequence[Tensor],
    head_scale: Tensor | None,
    scale: float | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> _Call:
    if not isinstance(layout, AttentionLayout):
        raise OfakernTypeError(
            f"{_WHERE}: layout must be an AttentionLayout, got {type(layout).__name__}\nTry: AttentionLayout.build(...)"
        )
    if (q_pos is None) != (k_pos is None):
        missing, given = ("q_pos", "k_pos") if q_pos is None else ("k_pos", "q_pos")
        raise OfakernValueError(f"{_WHERE}: {missing} must be given together with {given}, got None")
    _check_float("q", q, 3)
    device = q.device
    q, k, v = autocast(q), _checked_like(q, "k", k), _checked_like(q, "v", v)
    if q_pos is not None and k_pos is not None:
        q_pos, k_pos = _checked_like(q, "q_pos", q_pos), _checked_like(q, "k_pos", k_pos)
    for name, tensor in (("k", k), ("v", v), ("q_pos", q_pos), ("k_pos", k_pos)):
        if tensor is not None and tensor.dtype != q.dtype:
            raise OfakernTypeError(f"{_WHERE}: {name} must have q's dtype ({q.dtype}), got {tensor.dtype}")
    if layout.device != device:
        raise OfakernValueError(
            f"{_WHERE}: layout must be on q's device ({device}), got {layout.device}\nTry: layout.to(q.device)"
        )
    _check_shapes(q, k, v, layout, q_pos, k_pos)
    stat = torch.float64 if q.dtype == torch.float64 else torch.float32
    if len(tables) != len(layout.terms):
        raise OfakernValueError(
            f"{_WHERE}: tables must be one per term of the layout ({len(layout.terms)}), got {len(tables)}"
        )
    for t, table in enumerate(tables):
        _check_parameter(f"tables[{t}]", table, device, (q.shape[1], layout.terms[t].rows), "[H={},rows={}]")
    if head_scale is not None:
        _check_parameter("head_scale", head_scale, device, (q.shape[1],), "[H={}]")
        head_scale = head_scale.to(stat)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    if not -math.inf < scale < math.inf:  # not isfinite: this also traces with a symbolic width
        raise OfakernValueError(f"{_WHERE}: scale must be finite, got {scale}")
    dropout_p, dropout_seed = _check_dropout(dropout_p, dropout_seed, device)
    tables = tuple(table.to(stat) for table in tables)
    return _Call(q, k, v, layout, q_pos, k_pos, tables, head_scale, scale, dropout_p, dropout_seed)


def _check_float(name: str, tensor: Tensor, ndim: int) -> None:
    if not isinstance(tensor, Tensor):
        raise OfakernTypeError(f"{_WHERE}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        raise OfakernTypeError(f"{_WHERE}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.ndim != ndim:
        raise OfakernValueError(f"{_WHERE}: {name} must have {ndim} dimensions, got shape {list(tensor.shape)}")


def _checked_like(q: Tensor, name: str, tensor: Tensor) -> Tensor:
    _check_float(name, tensor, 3)
    if tensor.device != q.device:
        raise OfakernValueError(f"{_WHERE}: {name} must be on q's device ({q.device}), got {tensor.device}")
    return autocast(tensor)


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, q_pos: Tensor | None, k_pos: Tensor | None
) -> None:
    queries, heads, width = q.shape
    keys, key_heads = layout.keys, k.shape[1]
    if queries != layout.queries:
        raise OfakernValueError(f"{_WHERE}: q must have the layout's {layout.queries} queries, got {list(q.shape)}")
    if width < 1:
        raise OfakernValueError(f"{_WHERE}: K must be at least 1, got q of shape {list(q.shape)}")
    if heads < 1 or key_heads < 1 or heads % key_heads:
        raise OfakernValueError(f"{_WHERE}: H must be a multiple of k's heads ({key_heads}), got {heads}")
    _check_shape("k", k, (keys, key_heads, width), "[Nk={},Hk={},K={}]")
    _check_shape("v", v, (keys, key_heads, v.shape[2]), "[Nk={},Hk={},V={}]")
    if q_pos is not None and k_pos is not None:
        shared = layout.shared
        q_rows, k_rows = (queries, keys) if shared is None else (shared.q_rows, shared.k_rows)
        names = ("Nq", "Nk") if shared is None else ("shared.q_rows", "shared.k_rows")
        _check_shape("q_pos", q_pos, (q_rows, heads, q_pos.shape[2]), f"[{names[0]}={{}},H={{}},P={{}}]")
        _check_shape("k_pos", k_pos, (k_rows, key_heads, q_pos.shape[2]), f"[{names[1]}={{}},Hk={{}},P={{}}]")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], template: str) -> None:
    if tuple(tensor.shape) != shape:
        raise OfakernValueError(f"{_WHERE}: {name} must have shape {template.format(*shape)}, got {list(tensor.shape)}")


def _check_parameter(name: str, tensor: Tensor, device: torch.device, shape: tuple[int, ...], template: str) -> None:
    _check_float(name, tensor, len(shape))
    if tensor.device != device:
        raise OfakernValueError(f"{_WHERE}: {name} must be on q's device ({device}), got {tensor.device}")
    _check_shape(name, tensor, shape, template)


def _check_dropout(p: float, seed: Tensor | None, device: torch.device) -> tuple[float, Tensor | None]:
    p = float(p)
    if not 0.0 <= p < 1.0:
        raise OfakernValueError(f"{_WHERE}: dropout_p must be in [0, 1), got {p}")
    if p == 0.0:
        return p, None
    if seed is None:
        return p, draw_seed(device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        got = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise OfakernTypeError(f"{_WHERE}: dropout_seed must be an int64 tensor, got {got}")
    if seed.device != device:
        raise OfakernValueError(f"{_WHERE}: dropout_seed must be on q's device ({device}), got {seed.device}")
    _check_shape("dropout_seed", seed, (2,), "[2] (seed, offset)")
    return p, seed


def _limit(backend: str, call: _Call, return_lse: bool) -> str | None:
    """What keeps a backend from a checked call: "flash" and "cuda" have rules of their own."""
    if backend == "flash":
        return flash.limit(call, return_lse)
    return (cuda_limit if backend == "cuda" else limit)(call.q, call.v, call.q_pos)


def _run_reference(call: _Call) -> tuple[Tensor, Tensor]:
    layout = call.layout
    return attention_reference(
        call.q,
        call.k,
        call.v,
        layout.visible,
        layout.q_offsets,
        layout.k_offsets,
        q_pos=call.q_pos,
        k_pos=call.k_pos,
        q_index=None if layout.shared is None else layout.shared.q_index,
        k_index=None if layout.shared is None else layout.shared.k_index,
        terms=[(table, t.q_coord, t.k_coord, t.same) for table, t in zip(call.tables, layout.terms, strict=True)],
        head_scale=call.head_scale,
        scale=call.scale,
        dropout_p=call.dropout_p,
        dropout_seed=call.dropout_seed,
    )


def _run_op(backend: str, call: _Call) -> tuple[Tensor, Tensor]:
    q, k, v, layout, q_pos, k_pos, tables, head_scale, scale, dropout_p, dropout_seed = call
    first, second, fixed = layout.list_arguments()
    if backend != "cpu" and layout.shared is not None:  # the other kernels have a row per token
        if q_pos is not None and k_pos is not None:
            q_pos, k_pos = layout.shared.spelled_out(q_pos, k_pos)
        fixed = (*fixed[:5], None, None)
    table0, table1 = (*tables, None, None)[:2]
    terms = (table0, *first, table1, *second)
    return op.run(backend, q, k, v, q_pos, k_pos, *terms, head_scale, dropout_seed, *fixed, scale, dropout_p)


def _describe(call: _Call, backend: str) -> str:
    shapes = f"q{list(call.q.shape)} k{list(call.k.shape)} v{list(call.v.shape)}"
    if call.q_pos is not None:
        shapes += f" q_pos{list(call.q_pos.shape)}"
    shapes += "".join(f" table{list(table.shape)}" for table in call.tables)
    dtype = str(call.q.dtype).removeprefix("torch.")
    return f"attention {shapes} samples={call.layout.samples} {dtype} {call.q.device} -> {backend}"


_signature = inspect.signature(attention)

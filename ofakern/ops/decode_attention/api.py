"""The public door of `decode_attention`: every argument is checked here, then a backend runs the call."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor

from ofakern.errors import OfakernError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.ops import log
from ofakern.ops.decode_attention import op
from ofakern.ops.decode_attention.cache import KeyValueCache
from ofakern.ops.decode_attention.reference import decode_attention_reference
from ofakern.ops.library import STRAIGHT, straight

_WHERE = "decode_attention"
_UNPACKED = "the cache must be packed for the CPU kernel, and was made with backend='reference'"
_PACKED = "the cache must not be packed for the CPU kernel, and was made with backend='cpu'"
_logger = logging.getLogger("ofakern.ops.decode_attention")


def decode_attention(
    q: Tensor,
    cache: KeyValueCache,
    row_offsets: Tensor,
    *,
    slots: Tensor | None = None,
    counts: Tensor | None = None,
    bias: Tensor | None = None,
    head_scale: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one query token per row; rows of one sample (its beams) stand together and share their keys.

    out[r,h] = head_scale[h] * softmax_j(scale * q[r,h].k_j[h] + bias[h,j]) v_j[h], a row without keys gives 0.

    Args:
        q: `[R,H,K]` in the cache's dtype (under autocast it is cast to it).
        cache: a source cache (its sample b holds the keys of rows row_offsets[b]..row_offsets[b+1]; each key is read
            once for all of them), or a slots cache with `slots` and `counts`.
        row_offsets: int32 `[B+1]`, from 0 to R. A sample may have no rows. It, slots and counts are on the CPU or, of a
            GPU's tensors, on q's device: there the host does not read them, and wrong ones give a wrong result.
        slots: int32 `[R,T]`, the ancestry table: row r's step t stands in slot slots[r,t].
        counts: int32 `[B]`: the first counts[b] (at most T) steps are seen by the rows of sample b.
        bias: float32 `[H, sum of the samples' keys]`, the same for all rows of a sample.
        head_scale: `[H]`. scale: K**-0.5 if not given.
        return_lse: also returns the log-sum-exp of the scores, float32 `[R,H]` (natural; -inf without keys), by which
            results over separate sets of keys merge exactly.
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        `[R,H,Kv]` in q's dtype, with return_lse a tuple. Sums are float32; bits do not depend on the threads, nor on
        which other samples are in the call.

    Raises:
        OfakernTypeError, OfakernValueError: an argument of the wrong type, dtype, device or shape.
        OfakernRuntimeError: q needs a gradient (the kernel has none), or vmap.
        BackendError: the backend cannot run the call.
    """
    plain = type(cache) is KeyValueCache and straight(backend, q, row_offsets, slots, counts, bias, head_scale)
    if plain and not (torch.is_grad_enabled() and q.requires_grad):
        try:
            out, lse = _run(STRAIGHT, q, cache, row_offsets, slots, counts, bias, head_scale, scale)
            return (out, lse) if return_lse else out
        except OfakernError:
            pass  # refused: the checks below say why, or cast what can be cast
    q = _checked(q, cache, row_offsets, slots, counts, bias, head_scale)
    chosen = op.BACKENDS.select(backend, q, _limit(cache, backend))
    if log.ENABLED and not torch.compiler.is_compiling():
        log.once(_logger, f"decode_attention q{list(q.shape)} {q.dtype} source={slots is None} -> {chosen}")
    run = _run_reference if chosen == "reference" else _run
    out, lse = run(chosen, q, cache, row_offsets, slots, counts, bias, head_scale, scale)
    return (out, lse) if return_lse else out


def _run(
    backend: str,
    q: Tensor,
    cache: KeyValueCache,
    row_offsets: Tensor,
    slots: Tensor | None,
    counts: Tensor | None,
    bias: Tensor | None,
    head_scale: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and q.requires_grad:
        raise OfakernRuntimeError(
            f"{_WHERE}: q must not need a gradient, got requires_grad=True\nTry: torch.no_grad(), or attention."
        )
    on_gpu = backend == "cuda"
    out: tuple[Tensor, Tensor] = op.FORWARD[backend](
        q,
        cache.keys,
        cache.values,
        cache.key_scales,
        cache.value_scales,
        row_offsets,
        cache.device_runs if on_gpu else cache.runs,
        slots,
        counts,
        _float32(bias),
        _float32(head_scale),
        cache.value_width,
        cache.key_width**-0.5 if scale is None else scale,
        cache.longest if on_gpu else 0,
    )
    return out


def _float32(x: Tensor | None) -> Tensor | None:
    return x.float() if x is not None and x.dtype.is_floating_point and x.dtype != torch.float32 else x


def refusals(*args: Any, **kwargs: Any) -> tuple[str, dict[str, str | None]]:
    """What `ofakern.explain` prints of a call of `decode_attention`."""
    call = inspect.signature(decode_attention).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    q = _checked(*(given[name] for name in ("q", "cache", "row_offsets", "slots", "counts", "bias", "head_scale")))
    return op.BACKENDS.reasons(given["backend"], q, _limit(given["cache"], given["backend"]))


def _limit(cache: KeyValueCache, backend: str) -> str | None:
    if cache.runs is None:
        return None
    if backend == "cuda" or cache.keys.is_cuda:
        return _PACKED if cache.packed else None
    return None if cache.packed else _UNPACKED


def _run_reference(
    backend: str,
    q: Tensor,
    cache: KeyValueCache,
    row_offsets: Tensor,
    slots: Tensor | None,
    counts: Tensor | None,
    bias: Tensor | None,
    head_scale: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    k, v, first = cache.natural()
    scale = cache.key_width**-0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, k.dtype)
    seen = cache.lengths if counts is None else counts
    out, lse = decode_attention_reference(
        q.to(wide), k, v, row_offsets, seen, first=first, slots=slots, bias=bias, head_scale=head_scale, scale=scale
    )
    return out.to(q.dtype), lse


def _checked(
    q: Tensor,
    cache: KeyValueCache,
    row_offsets: Tensor,
    slots: Tensor | None,
    counts: Tensor | None,
    bias: Tensor | None,
    head_scale: Tensor | None,
) -> Tensor:
    """q in the cache's dtype. Values of the tables are checked by whoever reads them."""
    if not isinstance(cache, KeyValueCache):
        raise OfakernTypeError(f"{_WHERE}: cache must be a KeyValueCache, got {type(cache).__name__}")
    if not isinstance(q, Tensor):
        raise OfakernTypeError(f"{_WHERE}: q must be a tensor, got {type(q).__name__}")
    if q.ndim != 3 or q.shape[1] != cache.heads or q.shape[2] != cache.key_width:
        raise OfakernValueError(
            f"{_WHERE}: q must have shape [R,H={cache.heads},K={cache.key_width}], got {list(q.shape)}"
        )
    if q.dtype != cache.dtype:
        if not torch.is_autocast_enabled(q.device.type):
            raise OfakernTypeError(f"{_WHERE}: q must have the cache's dtype ({cache.dtype}), got {q.dtype}")
        q = q.to(cache.dtype)
    if q.device != cache.keys.device:
        raise OfakernValueError(f"{_WHERE}: q must be on the cache's device ({cache.keys.device}), got {q.device}")
    samples = _check_rows(q, row_offsets)
    if cache.runs is not None:
        _refuse_table(slots, counts)
        if cache.runs.shape[0] != samples:
            raise OfakernValueError(
                f"{_WHERE}: row_offsets must have one entry more than the cache has samples ({cache.runs.shape[0]}), "
                f"got {samples + 1}"
            )
    else:
        _check_table(slots, counts, q, samples)
    if bias is not None:
        _check_bias(bias, cache.heads)
    if head_scale is not None and tuple(head_scale.shape) != (cache.heads,):
        raise OfakernValueError(f"{_WHERE}: head_scale must have shape [H={cache.heads}], got {list(head_scale.shape)}")
    return q


def _check_integers(name: str, x: Tensor, device: torch.device) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.int32 or x.device.type not in ("cpu", device.type):
        got = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        where = "the CPU" + ("" if device.type == "cpu" else f" or {device}")
        raise OfakernTypeError(f"{_WHERE}: {name} must be an int32 tensor on {where}, got {got}")


def _check_rows(q: Tensor, row_offsets: Tensor) -> int:
    _check_integers("row_offsets", row_offsets, q.device)
    if row_offsets.ndim != 1 or row_offsets.shape[0] < 1:
        raise OfakernValueError(f"{_WHERE}: row_offsets must have shape [B+1], got {list(row_offsets.shape)}")
    return row_offsets.shape[0] - 1


def _refuse_table(slots: Tensor | None, counts: Tensor | None) -> None:
    if slots is not None or counts is not None:
        raise OfakernValueError(f"{_WHERE}: slots and counts must be None with a source cache, got a table")


def _check_table(slots: Tensor | None, counts: Tensor | None, q: Tensor, samples: int) -> None:
    if slots is None or counts is None:
        raise OfakernValueError(f"{_WHERE}: slots and counts must be given with a slots cache, got None")
    _check_integers("slots", slots, q.device)
    _check_integers("counts", counts, q.device)
    if slots.ndim != 2 or slots.shape[0] != q.shape[0]:
        raise OfakernValueError(f"{_WHERE}: slots must have shape [R={q.shape[0]},T], got {list(slots.shape)}")
    if tuple(counts.shape) != (samples,):
        raise OfakernValueError(f"{_WHERE}: counts must have shape [B={samples}], got {list(counts.shape)}")


def _check_bias(bias: Tensor, heads: int) -> None:
    if not isinstance(bias, Tensor) or not bias.dtype.is_floating_point:
        raise OfakernTypeError(f"{_WHERE}: bias must be a float32 tensor, got {getattr(bias, 'dtype', type(bias))}")
    if bias.ndim != 2 or bias.shape[0] != heads:
        raise OfakernValueError(
            f"{_WHERE}: bias must have shape [H={heads}, sum of the samples' keys], got {list(bias.shape)}"
        )

"""The fused LayerNorms on GPUs in Triton: tiles, launches, and the calls that op.py registers. The kernels:
triton_kernels/. They have not run on a GPU yet: `auto` does not take them.

A row stays in a program's registers, so every array is read once. Parameter gradients are sums of parts, one per
program, whose number and order shapes fix; a table's gradient is a sum over sorted rows. No atomics: the same bits
every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofakern.ops.layer_norm.triton_kernels import backward, forward, tables
from ofakern.ops.triton_launch import Launch, ceil_div, options, power_of_2
from ofakern.ops.triton_rows import Call, over_rows, over_runs

_TABLE_COLUMNS, _TABLE_ROWS = 512, 4


def add_forward_call(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None, eps: float, p: float
) -> Call:
    """out, total, stats."""
    out, total, stats = _new(x), _new(x), _stats(x, x.numel() // x.shape[-1])
    arguments: dict[str, Any] = {
        "out": out,
        "total": total,
        "stats": stats,
        "x": x,
        "residual": residual,
        "weight": weight,
    }
    arguments |= {"bias": bias, "seed": seed, "rows": stats.shape[0], "eps": eps, **_dropout(p)}
    launch = over_rows(forward.add_layer_norm_forward, arguments, x.shape[-1], {"DROPOUT": p > 0.0})
    return Call([launch], (out, total, stats))


def add_backward_call(
    dout: Tensor, dtotal: Tensor | None, total: Tensor, stats: Tensor, weight: Tensor, seed: Tensor | None, p: float
) -> Call:
    """dx (no elements without dropout: it equals dresidual), dresidual."""
    dresidual = _new(total)
    dx = _new(total) if p else total.new_empty(0)
    arguments: dict[str, Any] = {
        "dx": dx if p else None,
        "dresidual": dresidual,
        "dout": dout,
        "dtotal": dtotal,
        "total": total,
    }
    arguments |= {"stats": stats, "weight": weight, "seed": seed, "rows": stats.shape[0], **_dropout(p)}
    constants = {"DTOTAL": dtotal is not None, "DROPOUT": p > 0.0}
    launch, parts = over_runs(backward.add_layer_norm_backward, arguments, weight, constants)
    return Call([launch], (dx, dresidual), parts)


def gelu_forward_call(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Call:
    """out, stats."""
    out, stats = _new(x), _stats(x, x.numel() // x.shape[-1])
    arguments: dict[str, Any] = {
        "out": out,
        "stats": stats,
        "x": x,
        "weight": weight,
        "bias": bias,
        "rows": stats.shape[0],
        "eps": eps,
    }
    return Call([over_rows(forward.gelu_layer_norm_forward, arguments, x.shape[-1])], (out, stats))


def gelu_backward_call(dout: Tensor, x: Tensor, stats: Tensor, weight: Tensor) -> Call:
    """dx."""
    dx = _new(x)
    arguments: dict[str, Any] = {
        "dx": dx,
        "dout": dout,
        "x": x,
        "stats": stats,
        "weight": weight,
        "rows": stats.shape[0],
    }
    launch, parts = over_runs(backward.gelu_layer_norm_backward, arguments, weight)
    return Call([launch], (dx,), parts)


def head_forward_call(x: Tensor, head_scale: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Call:
    """out, stats."""
    rows, width = x.shape[0], weight.shape[0]
    out, stats = _new(x, (rows, width)), _stats(x, rows)
    arguments: dict[str, Any] = {
        "out": out,
        "stats": stats,
        "x": x,
        "head_scale": head_scale,
        "weight": weight,
        "bias": bias,
    }
    arguments |= {"rows": rows, "eps": eps}
    constants = {"HEAD_WIDTH": x.shape[2]}
    return Call([over_rows(forward.head_scale_layer_norm_forward, arguments, width, constants)], (out, stats))


def head_backward_call(dout: Tensor, x: Tensor, head_scale: Tensor, stats: Tensor, weight: Tensor) -> Call:
    """dx."""
    dx = _new(x)
    arguments: dict[str, Any] = {
        "dx": dx,
        "dout": dout,
        "x": x,
        "head_scale": head_scale,
        "stats": stats,
        "weight": weight,
    }
    arguments |= {"rows": x.shape[0]}
    constants = {"HEAD_WIDTH": x.shape[2]}
    launch, parts = over_runs(backward.head_scale_layer_norm_backward, arguments, weight, constants, sums=3)
    return Call([launch], (dx,), parts)


def embed_forward_call(
    tokens: Tensor,
    table: Tensor,
    types: Tensor | None,
    type_table: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: float,
    eps: float,
) -> Call:
    """out, stats."""
    width = table.shape[1]
    out, stats = _new(table, (*tokens.shape, width)), _stats(table, tokens.numel())
    arguments: dict[str, Any] = {"out": out, "stats": stats, "weight": weight, "bias": bias, "eps": eps}
    arguments |= _embedding(tokens, table, types, type_table, scale)
    launch = over_rows(forward.embed_layer_norm_forward, arguments, width, _typing(types, type_table))
    return Call([launch], (out, stats))


def embed_backward_call(
    dout: Tensor,
    tokens: Tensor,
    table: Tensor,
    types: Tensor | None,
    type_table: Tensor | None,
    stats: Tensor,
    weight: Tensor,
    scale: float,
) -> Call:
    """dtable, dtype_table (no elements where it is none, or where it is the third of the parts)."""
    dtable, means = _new(table), _stats(table, tokens.numel())
    typing = _typing(types, type_table)
    arguments: dict[str, Any] = {"means": means, "dout": dout, "stats": stats, "weight": weight}
    arguments |= _embedding(tokens, table, types, type_table, scale)
    first, parts = over_runs(
        backward.embed_layer_norm_backward, arguments, weight, typing, sums=3 if typing["ONE_TYPE"] else 2
    )
    shared = {"dout": dout, "stats": stats, "means": means, "weight": weight}
    launches = [first, _table(dtable, (table, tokens, scale), (type_table, types, 1.0), shared)]
    dtypes = table.new_empty(0)
    if types is not None and type_table is not None:
        dtypes = _new(type_table)
        launches.append(_table(dtypes, (type_table, types, 1.0), (table, tokens, scale), shared))
    return Call(launches, (dtable, dtypes), parts)


# ---- what op.py registers -------------------------------------------------------------------------------------------


def add_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return add_forward_call(*arguments).run("add_layer_norm")


def add_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = add_backward_call(*arguments)
    return (*call.run("add_layer_norm"), *call.sums())


def gelu_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return gelu_forward_call(*arguments).run("gelu_layer_norm")


def gelu_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = gelu_backward_call(*arguments)
    return (*call.run("gelu_layer_norm"), *call.sums())


def head_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return head_forward_call(*arguments).run("head_scale_layer_norm")


def head_backward(dout: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    call = head_backward_call(dout, x, *rest)
    (dx,) = call.run("head_scale_layer_norm")
    dweight, dbias, dscale = call.sums()
    return dx, dscale.view(x.shape[1:]).sum(1), dweight, dbias


def embed_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return embed_forward_call(*arguments).run("embed_layer_norm")


def embed_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = embed_backward_call(*arguments)
    dtable, dtypes = call.run("embed_layer_norm")
    dweight, dbias, *dtype = call.sums()
    return dtable, dtype[0].to(dtable.dtype)[None] if dtype else dtypes, dweight, dbias


# ---- parts of a launch ----------------------------------------------------------------------------------------------


def _table(
    down: Tensor,
    own: tuple[Tensor, Tensor, float],
    other: tuple[Tensor | None, Tensor | None, float],
    shared: dict[str, Tensor],
) -> Launch:
    """own, other: table, index of every row (None: row 0), factor."""
    (table, index, factor), (other_table, other_index, other_factor) = own, other
    entries, width = table.shape
    order_of, order = torch.sort(index.flatten(), stable=True)
    offsets = torch.searchsorted(order_of, torch.arange(entries + 1, device=index.device))
    arguments: dict[str, Any] = {
        "down": down,
        "own": table,
        "own_factor": factor,
        "order": order,
        "offsets": offsets,
        **shared,
    }
    arguments |= {"other": other_table, "other_index": other_index, "other_factor": other_factor}
    arguments |= {"other_entries": 0 if other_table is None else other_table.shape[0]}
    block = min(_TABLE_COLUMNS, power_of_2(width, 4))
    constants: dict[str, Any] = {"OTHER": other_table is not None, "OTHER_INDEX": other_index is not None}
    constants |= {"WIDTH": width, "BLOCK": block, "ROWS": _TABLE_ROWS}
    grid = (entries, ceil_div(width, block))
    return Launch(tables.embed_layer_norm_table, grid, arguments, constants, options(4, 2))


def _embedding(
    tokens: Tensor, table: Tensor, types: Tensor | None, type_table: Tensor | None, scale: float
) -> dict[str, Any]:
    type_entries = 0 if type_table is None else type_table.shape[0]
    named: dict[str, Any] = {"tokens": tokens, "table": table, "types": types, "type_table": type_table}
    return named | {
        "scale": scale,
        "rows": tokens.numel(),
        "entries": table.shape[0],
        "type_entries": type_entries,
    }


def _typing(types: Tensor | None, type_table: Tensor | None) -> dict[str, Any]:
    return {"TYPED": type_table is not None, "ONE_TYPE": type_table is not None and types is None}


def _dropout(p: float) -> dict[str, Any]:
    return {"keep_scale": 1.0 / (1.0 - p), "threshold": min(int(p * 2.0**32 + 0.5), 2**32 - 1)}


def _new(like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    return torch.empty(like.shape if shape is None else shape, dtype=like.dtype, device=like.device)


def _stats(like: Tensor, rows: int) -> Tensor:
    return torch.empty((rows, 2), dtype=torch.float32, device=like.device)

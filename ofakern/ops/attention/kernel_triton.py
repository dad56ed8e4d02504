"""Attention on GPUs in Triton: which blocks a call takes, and its launches. The kernels: triton_kernels/.

A call is a list of `Launch`es over buffers from torch's allocator, on torch's current stream, without a wait for the
device and without a compilation that depends on lengths. The tests compile the same launches ahead of time. These
kernels have not run on a GPU yet: `auto` does not take them.

Source: online softmax and recomputation as in FlashAttention-2 (arXiv 2307.08691); first block sizes from PyTorch
FlexAttention's H100 table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ofakern.ops.attention.triton_kernels import backward, forward, plan, tables
from ofakern.ops.triton_launch import Launch, ceil_div, options, power_of_2, run, shared_memory

_Named = Mapping[str, Any]

_LOG2E = 1.4426950408889634
_NAMES = (
    ("q", "k", "v", "q_pos", "k_pos", "table0", "q_coord0", "k_coord0", "same0")
    + ("table1", "q_coord1", "k_coord1", "same1", "head_scale", "seed")
    + ("visible", "q_offsets", "k_offsets", "key_seen", "k_range", "scale", "dropout_p")
)
# Programs of the table kernel over all heads: enough to fill a GPU; each owns one f32 copy of a table's head.
_TABLE_PROGRAMS = 512
_SPAN, _RUN = 64, 128


@dataclass(frozen=True)
class Blocks:
    """queries x keys of a tile, warps of a program, and how many tiles its loads run ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


# By the bytes of an element, then the first row whose width is at least the padded K + V + P. Chosen from what compiles
# for sm_90 without spills (tests/build/triton_resources.json), not from timings: there are none yet.
_BLOCKS: dict[str, dict[int, tuple[tuple[int, Blocks], ...]]] = {
    "forward": {
        2: ((192, Blocks(128, 128, 8, 3)), (256, Blocks(128, 64, 8, 3)), (768, Blocks(64, 32, 4, 2))),
        4: ((192, Blocks(32, 32, 4, 2)), (768, Blocks(16, 16, 4, 1))),
    },
    "queries": {
        2: ((256, Blocks(128, 64, 8, 2)), (768, Blocks(64, 32, 8, 1))),
        4: ((192, Blocks(32, 32, 8, 1)), (768, Blocks(16, 16, 4, 1))),
    },
    "keys": {
        2: ((256, Blocks(32, 128, 8, 2)), (768, Blocks(32, 64, 8, 1))),
        4: ((192, Blocks(16, 32, 8, 1)), (768, Blocks(16, 16, 4, 1))),
    },
    "tables": {  # one stage: loads of the sums must not run ahead of the stores
        2: ((256, Blocks(64, 64, 8, 1)), (768, Blocks(32, 32, 4, 1))),
        4: ((192, Blocks(32, 32, 8, 1)), (768, Blocks(16, 16, 4, 1))),
    },
}
# Below this much shared memory for a program (A100: 163 KiB, consumer GPUs: 99 KiB), 16-bit tiles have half the keys.
_ROOMY = 200 * 1024


def forward_call(inputs: tuple[Any, ...], shared_memory: int) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """(out, lse) still unwritten, and the launches that write them.

    inputs: as the schema in op.py orders them. shared_memory: bytes that a program may use on the device.
    """
    given = dict(zip(_NAMES, inputs, strict=True))
    q, v = given["q"], given["v"]
    out = torch.empty((q.shape[0], q.shape[1], v.shape[2]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    blocks = _blocks("forward", given, shared_memory)
    plan_buffer, planned = _plan_queries(given, blocks.queries)
    launches = [planned, _tile_launch(forward.attention_forward, plan_buffer, given, blocks, {"out": out, "lse": lse})]
    return (out, lse), launches


def backward_call(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, inputs: tuple[Any, ...], shared_memory: int
) -> tuple[list[Tensor | None], list[Launch], dict[str, Tensor]]:
    """Gradients in the schema's order (None where absent), the launches that write them, and the sums left to do.

    The sums are named after their input: its gradient is the tensor added over its first dimension.
    """
    given = dict(zip(_NAMES, inputs, strict=True))
    grads = {f"d{name}": _like(given[name]) for name in ("q", "k", "v", "q_pos", "k_pos")}
    delta = torch.empty(
        lse.shape, dtype=torch.float32, device=lse.device
    )  # written by the first kernel, read by the others
    shared = {"delta": delta, "dout": dout, "lse": lse, "dout_stride": dout.stride(0), "dout_head": dout.stride(1)}
    sums: dict[str, Tensor] = {}
    launches = _backward_queries(given, shared | {"dlse": dlse, "out": out}, grads, sums, shared_memory)
    launches += _backward_keys(given, shared, grads, shared_memory)
    if given["table0"] is not None:
        launches += _backward_tables(given, shared, sums, shared_memory)
    return list(grads.values()), launches, sums


def _backward_queries(
    given: _Named, shared: _Named, grads: _Named, sums: dict[str, Tensor], shared_memory: int
) -> list[Launch]:
    blocks = _blocks("queries", given, shared_memory)
    query_plan, planned = _plan_queries(given, blocks.queries)
    if given["head_scale"] is not None:
        heads = given["head_scale"].shape[0]
        sums["head_scale"] = torch.empty((query_plan.shape[0], heads), dtype=torch.float32, device=query_plan.device)
    own = {"dq": grads["dq"], "dq_pos": grads["dq_pos"], "scale_parts": sums.get("head_scale")}
    own |= {"scale": given["scale"], **shared}
    constants = {"LSE_GRADIENT": shared["dlse"] is not None}
    return [planned, _tile_launch(backward.attention_backward_queries, query_plan, given, blocks, own, constants)]


def _backward_keys(given: _Named, shared: _Named, grads: _Named, shared_memory: int) -> list[Launch]:
    blocks = _blocks("keys", given, shared_memory)
    query_plan, planned = _plan_queries(given, blocks.queries)
    key_plan, keys_planned = _plan_keys(given, query_plan, blocks.keys)
    own = {"dk": grads["dk"], "dv": grads["dv"], "dk_pos": grads["dk_pos"], "key_plan": key_plan}
    own |= {"scale": given["scale"], **shared}
    launch = _tile_launch(backward.attention_backward_keys, query_plan, given, blocks, own)
    return [planned, keys_planned, replace(launch, grid=(key_plan.shape[0], given["k"].shape[1]))]


def _backward_tables(given: _Named, shared: _Named, sums: dict[str, Tensor], shared_memory: int) -> list[Launch]:
    """One launch per term, which reads only that term's keys."""
    blocks, heads = _blocks("tables", given, shared_memory), given["q"].shape[1]
    query_plan, planned = _plan_queries(given, blocks.queries)
    parts, per_part = _partition(query_plan.shape[0], heads)
    launches = [planned]
    for t in range(_terms(given)):
        table = given[f"table{t}"]
        sums[f"table{t}"] = table.new_zeros((parts, *table.shape))
        own = {"parts": sums[f"table{t}"], "blocks": query_plan.shape[0], "blocks_per_part": per_part, **shared}
        constants = {"OWN": t, "SPAN": _SPAN, "RUN": _RUN}
        launch = _tile_launch(tables.attention_backward_tables, query_plan, given, blocks, own, constants)
        launches.append(replace(launch, grid=(parts, heads)))
    return launches


def attention_forward_triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The registered op's forward: out and lse of checked, kernel-ready inputs."""
    results, launches = forward_call(inputs, shared_memory(inputs[0]))
    run("attention", inputs[0], launches)
    return results


def attention_backward_triton(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any
) -> list[Tensor | None]:
    """The registered op's backward: dq, dk, dv, dq_pos, dk_pos, dtable0, dtable1, dhead_scale; None where absent."""
    grads, launches, sums = backward_call(dout, dlse, out, lse, inputs, shared_memory(inputs[0]))
    run("attention", inputs[0], launches)
    # torch adds over the first dimension in an order that the shape alone fixes.
    return grads + [sums[name].sum(0) if name in sums else None for name in ("table0", "table1", "head_scale")]


def _like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _partition(blocks: int, heads: int) -> tuple[int, int]:
    """(programs per head, query blocks of each) of the table kernel; a function of shapes only."""
    parts = max(1, min(blocks, _TABLE_PROGRAMS // heads))
    return parts, ceil_div(blocks, parts)


def _padded(width: int) -> int:
    return power_of_2(width, 16) if width else 0


def _widths(given: _Named) -> tuple[int, int, int]:
    return given["q"].shape[2], given["v"].shape[2], 0 if given["q_pos"] is None else given["q_pos"].shape[2]


def _blocks(pass_name: str, given: _Named, shared_memory: int) -> Blocks:
    total, size = sum(_padded(width) for width in _widths(given)), given["q"].element_size()
    blocks = next(blocks for width, blocks in _BLOCKS[pass_name][size] if total <= width)
    return replace(blocks, keys=blocks.keys // 2) if size == 2 and shared_memory < _ROOMY else blocks


def _terms(given: _Named) -> int:
    return sum(given[name] is not None for name in ("table0", "table1"))


def _plan_queries(given: _Named, size: int) -> tuple[Tensor, Launch]:
    q, samples = given["q"], given["k_range"].shape[0]
    count = q.shape[0] // size + samples
    buffer = torch.empty((count, plan.QUERY_COLUMNS.value), dtype=torch.int32, device=q.device)
    arguments = {"plan": buffer, "samples": samples}
    arguments |= {name: given[name] for name in ("visible", "same0", "same1", "q_offsets")}
    constants = {"TERMS": _terms(given), "BLOCK_Q": size}
    return buffer, Launch(plan.plan_queries, (count,), arguments, constants, options(4, 1))


def _plan_keys(given: _Named, query_plan: Tensor, size: int) -> tuple[Tensor, Launch]:
    k, samples = given["k"], given["k_range"].shape[0]
    count = k.shape[0] // size + samples
    buffer = torch.empty((count, plan.KEY_COLUMNS.value), dtype=torch.int32, device=k.device)
    arguments = {"plan": buffer, "query_plan": query_plan, "k_offsets": given["k_offsets"]}
    arguments |= {"samples": samples, "query_blocks": query_plan.shape[0]}
    return buffer, Launch(plan.plan_keys, (count,), arguments, {"BLOCK_K": size}, options(4, 1))


def _tile_launch(
    kernel: Any,
    query_plan: Tensor,
    given: _Named,
    blocks: Blocks,
    own: _Named,
    own_constants: _Named | None = None,
) -> Launch:
    """What the four tile kernels share; the grid is that of a kernel over query blocks."""
    q, p = given["q"], given["dropout_p"]
    arguments = dict(own) | {"plan": query_plan}
    arguments |= {name: given[name] for name in _NAMES[: _NAMES.index("k_range")]}
    for name in ("q", "k", "v", "q_pos", "k_pos"):
        tensor = given[name]
        arguments[f"{name}_stride"], arguments[f"{name}_head"] = (0, 0) if tensor is None else tensor.stride()[:2]
    for t in range(2):
        table = given[f"table{t}"]
        arguments[f"rows{t}"] = 0 if table is None else table.shape[1]
    arguments |= {"heads": q.shape[1], "score_scale": given["scale"] * _LOG2E}
    arguments |= {"keep_scale": 1.0 / (1.0 - p), "threshold": min(int(p * 2.0**32 + 0.5), 2**32 - 1)}
    width, value, pos = _widths(given)
    constants: dict[str, Any] = {"GROUP": q.shape[1] // given["k"].shape[1], "WIDTH": width, "VALUE": value, "POS": pos}
    constants |= {"BLOCK_WIDTH": _padded(width), "BLOCK_VALUE": _padded(value), "BLOCK_POS": _padded(pos)}
    constants |= {"TERMS": _terms(given), "HEAD_SCALE": given["head_scale"] is not None, "DROPOUT": p > 0.0}
    constants |= {"BLOCK_Q": blocks.queries, "BLOCK_K": blocks.keys, **(own_constants or {})}
    grid = (query_plan.shape[0], q.shape[1])
    return Launch(kernel, grid, arguments, constants, options(blocks.warps, blocks.stages))

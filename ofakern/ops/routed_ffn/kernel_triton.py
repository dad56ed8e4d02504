"""routed_linear on GPUs in Triton: blocks and launches, one per expert and product. The kernels: triton_kernels/. They
have not run on a GPU yet: `auto` does not take them.

Grouping tokens by expert is part of the loads and stores, so neither x nor y is copied. Every result has one owner and
one order of summation: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ofakern.ops.routed_ffn.triton_kernels import products
from ofakern.ops.triton_launch import Launch, ceil_div, options, run, shared_memory


class Blocks(NamedTuple):
    """rows x columns of a tile, the length of a step of its product, warps, and how many steps its loads run ahead."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


# By the bytes of an element; from what compiles for sm_90 without spills, not from timings: there are none yet.
_BLOCKS = {2: Blocks(128, 128, 64, 8, 3), 4: Blocks(32, 32, 32, 4, 2)}
_ROOMY = 160 * 1024  # bytes of shared memory that three stages need, with some to spare


def forward_launches(
    y: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    counts: Sequence[int],
    source: Tensor | None,
    target: Tensor | None,
    shared: int,
) -> list[Launch]:
    """Writes y `[N, O]`; shared: bytes of shared memory that a program may use."""
    launches = []
    for e, first, end in _experts(counts):
        bias = biases[e] if biases else None
        launches.append(_rows((y, target), (x, source), weights[e], bias, first, end, shared, transposed=False))
    return launches


def gradient_launches(
    grads: Sequence[Tensor],
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    counts: Sequence[int],
    source: Tensor | None,
    target: Tensor | None,
    wanted: tuple[bool, bool, bool],
    shared: int,
) -> list[Launch]:
    """Writes grads: dx, E dweights, E dbiases. wanted: x, weights (and biases), with a bias."""
    wants_x, wants_weights, with_bias = wanted
    dweights, dbiases = grads[1 : 1 + len(weights)], grads[1 + len(weights) :]
    launches = []
    for e, first, end in _experts(counts):
        if wants_x:
            rows = _rows((grads[0], source), (dy, target), weights[e], None, first, end, shared, transposed=True)
            launches.append(rows)
        if wants_weights:
            dbias = dbiases[e] if with_bias else None
            launches.append(_weights(dweights[e], dbias, (dy, target), (x, source), first, end, shared))
    return launches


def forward_triton(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    counts: list[int],
    source: Tensor | None,
    target: Tensor | None,
) -> Tensor:
    """The registered op routed_linear_fwd."""
    y = torch.empty((x.shape[0], weights[0].shape[0]), dtype=x.dtype, device=x.device)
    run("routed_ffn", x, forward_launches(y, x, weights, biases, counts, source, target, shared_memory(x)))
    return y


def backward_triton(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    counts: list[int],
    source: Tensor | None,
    target: Tensor | None,
    wants_x: bool,
    wants_weights: bool,
    with_bias: bool,
) -> list[Tensor]:
    """The registered op routed_linear_bwd: dx, dweights, dbiases; no elements where not wanted."""

    def new(shape: Sequence[int], want: bool) -> Tensor:
        return torch.empty(tuple(shape) if want else 0, dtype=x.dtype, device=x.device)

    grads = [new(x.shape, wants_x), *(new(w.shape, wants_weights) for w in weights)]
    if with_bias:
        grads += [new(w.shape[:1], wants_weights) for w in weights]
    wanted = (wants_x, wants_weights, with_bias)
    launches = gradient_launches(grads, dy, x, weights, counts, source, target, wanted, shared_memory(x))
    run("routed_ffn", x, launches)
    return grads


def _experts(counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Expert, first place, end."""
    end = 0
    for e, count in enumerate(counts):
        first, end = end, end + count
        yield e, first, end


def _side(name: str, tensor: Tensor, index: Tensor | None, first: int, end: int) -> dict[str, Any]:
    """A tensor's rows of an expert's places: themselves, or all rows with the places' part of the index."""
    if index is None:
        return {name: tensor[first:end], f"{name}_index": None}
    return {name: tensor, f"{name}_index": index[first:end]}


def _rows(
    out: tuple[Tensor, Tensor | None],
    given: tuple[Tensor, Tensor | None],
    weight: Tensor,
    bias: Tensor | None,
    first: int,
    end: int,
    shared: int,
    transposed: bool,
) -> Launch:
    blocks, stages = _blocks(weight, shared)
    arguments = _side("out", *out, first, end) | _side("given", *given, first, end)
    arguments |= {"weight": weight, "bias": bias, "tokens": end - first, "rows": out[0].shape[0]}
    wide, width = out[0].shape[1], given[0].shape[1]
    constants: dict[str, Any] = {
        "OUT_INDEX": out[1] is not None,
        "GIVEN_INDEX": given[1] is not None,
        "TRANSPOSED": transposed,
    }
    constants |= {"BIAS": bias is not None, "WIDTH": width, "OUT": wide}
    constants |= {"BLOCK_N": blocks.rows, "BLOCK_O": blocks.columns, "BLOCK_W": blocks.step}
    grid = (ceil_div(end - first, blocks.rows), ceil_div(wide, blocks.columns))
    return Launch(products.routed_rows, grid, arguments, constants, options(blocks.warps, stages))


def _weights(
    dweight: Tensor,
    dbias: Tensor | None,
    dy: tuple[Tensor, Tensor | None],
    x: tuple[Tensor, Tensor | None],
    first: int,
    end: int,
    shared: int,
) -> Launch:
    blocks, stages = _blocks(dweight, shared)
    arguments = _side("dy", *dy, first, end) | _side("x", *x, first, end)
    arguments |= {"dweight": dweight, "dbias": dbias, "tokens": end - first, "rows": dy[0].shape[0]}
    out, width = dweight.shape
    constants: dict[str, Any] = {"DY_INDEX": dy[1] is not None, "X_INDEX": x[1] is not None, "BIAS": dbias is not None}
    constants |= {"WIDTH": width, "OUT": out}
    constants |= {"BLOCK_O": blocks.rows, "BLOCK_W": blocks.columns, "BLOCK_N": blocks.step}
    grid = (ceil_div(out, blocks.rows), ceil_div(width, blocks.columns))
    return Launch(products.routed_weights, grid, arguments, constants, options(blocks.warps, stages))


def _blocks(like: Tensor, shared: int) -> tuple[Blocks, int]:
    blocks = _BLOCKS[like.element_size()]
    return blocks, blocks.stages if shared >= _ROOMY else 2

"""Forward: a program per tile of rows writes out and stats f32 [rows, 2] (mean, 1 / deviation)."""

import triton
import triton.language as tl

from ofakern.ops.layer_norm.triton_kernels.rows import load_entries, normalise, row_keep
from ofakern.ops.triton_device import load_columns, load_tile, normal, tile_of


@triton.jit(do_not_specialize=["rows", "threshold"])
def add_layer_norm_forward(
    out,
    total,
    stats,
    x,
    residual,
    weight,
    bias,
    seed,
    rows,
    eps,
    keep_scale,
    threshold,
    DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, column, there, at = tile_of(tl.program_id(0), rows, WIDTH, BLOCK, ROWS)
    z = load_tile(x, at, there)
    if DROPOUT:
        z = tl.where(row_keep(seed, row, threshold, ROWS, BLOCK), z * keep_scale, 0.0)
    stored = (z + load_tile(residual, at, there)).to(total.dtype.element_ty)
    tl.store(total + at, stored, mask=there)
    normalise(stored.to(tl.float32), row, column, there, at, rows, out, stats, weight, bias, eps, WIDTH)


@triton.jit(do_not_specialize=["rows"])
def gelu_layer_norm_forward(
    out,
    stats,
    x,
    weight,
    bias,
    rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, column, there, at = tile_of(tl.program_id(0), rows, WIDTH, BLOCK, ROWS)
    value = load_tile(x, at, there)
    distribution, _ = normal(value)
    normalise(value * distribution, row, column, there, at, rows, out, stats, weight, bias, eps, WIDTH)


@triton.jit(do_not_specialize=["rows"])
def head_scale_layer_norm_forward(
    out,
    stats,
    x,
    head_scale,
    weight,
    bias,
    rows,
    eps,
    HEAD_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, column, there, at = tile_of(tl.program_id(0), rows, WIDTH, BLOCK, ROWS)
    scale = tl.load(head_scale + column // HEAD_WIDTH, mask=column < WIDTH, other=0.0)[None, :]
    z = load_tile(x, at, there) * scale
    normalise(z, row, column, there, at, rows, out, stats, weight, bias, eps, WIDTH)


@triton.jit(do_not_specialize=["rows", "entries", "type_entries"])
def embed_layer_norm_forward(
    out,
    stats,
    tokens,
    table,
    types,
    type_table,
    weight,
    bias,
    rows,
    entries,
    type_entries,
    scale,
    eps,
    TYPED: tl.constexpr,
    ONE_TYPE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, column, there, at = tile_of(tl.program_id(0), rows, WIDTH, BLOCK, ROWS)
    token = tl.load(tokens + row, mask=row < rows, other=0)
    z = load_entries(table, token, entries, column, there, WIDTH) * scale
    if ONE_TYPE:
        z += tl.where(there, load_columns(type_table, column, WIDTH).to(tl.float32), 0.0)
    elif TYPED:
        kind = tl.load(types + row, mask=row < rows, other=0)
        z += load_entries(type_table, kind, type_entries, column, there, WIDTH)
    normalise(z, row, column, there, at, rows, out, stats, weight, bias, eps, WIDTH)

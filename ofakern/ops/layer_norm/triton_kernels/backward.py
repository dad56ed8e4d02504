"""Backward: a program owns a run of tiles, whose rows it writes; what it sums over them is one part of a gradient.

With xhat = (z - mean) * rstd, g = dout * weight: dz = rstd * (g - mean(g) - xhat * mean(g * xhat)). The parts
f32 [.., parts, WIDTH] (dweight, dbias, and where there is one a third gradient) are added over in their order.
"""

import triton
import triton.language as tl

from ofakern.ops.layer_norm.triton_kernels.rows import load_entries, load_stats, row_keep, row_means
from ofakern.ops.triton_device import load_columns, load_tile, normal, store_part, tile_of


@triton.jit(do_not_specialize=["rows", "tiles", "tiles_per_part", "threshold"])
def add_layer_norm_backward(
    dx,
    dresidual,
    parts,
    dout,
    dtotal,
    total,
    stats,
    weight,
    seed,
    rows,
    tiles,
    tiles_per_part,
    keep_scale,
    threshold,
    DTOTAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    part = tl.program_id(0)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    own_column = tl.arange(0, BLOCK)
    factor = load_columns(weight, own_column, WIDTH)
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, tiles)):
        row, column, there, at = tile_of(tile, rows, WIDTH, BLOCK, ROWS)
        mean, rstd = load_stats(stats, row, rows)
        gradient = load_tile(dout, at, there)
        xhat = tl.where(there, (load_tile(total, at, there) - mean) * rstd, 0.0)
        a, b = row_means(gradient, xhat, factor, WIDTH)
        dz = rstd * (gradient * factor - a - xhat * b)
        if DTOTAL:
            dz += load_tile(dtotal, at, there)
        tl.store(dresidual + at, dz.to(dresidual.dtype.element_ty), mask=there)
        if DROPOUT:
            dz = tl.where(row_keep(seed, row, threshold, ROWS, BLOCK), dz * keep_scale, 0.0)
            tl.store(dx + at, dz.to(dx.dtype.element_ty), mask=there)
        dweight += gradient * xhat
        dbias += gradient
    store_part(parts, 0, dweight, own_column, WIDTH)
    store_part(parts, 1, dbias, own_column, WIDTH)


@triton.jit(do_not_specialize=["rows", "tiles", "tiles_per_part"])
def gelu_layer_norm_backward(
    dx,
    parts,
    dout,
    x,
    stats,
    weight,
    rows,
    tiles,
    tiles_per_part,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    part = tl.program_id(0)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    own_column = tl.arange(0, BLOCK)
    factor = load_columns(weight, own_column, WIDTH)
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, tiles)):
        row, column, there, at = tile_of(tile, rows, WIDTH, BLOCK, ROWS)
        mean, rstd = load_stats(stats, row, rows)
        gradient = load_tile(dout, at, there)
        value = load_tile(x, at, there)
        distribution, density = normal(value)
        xhat = tl.where(there, (value * distribution - mean) * rstd, 0.0)
        a, b = row_means(gradient, xhat, factor, WIDTH)
        dz = rstd * (gradient * factor - a - xhat * b)
        tl.store(dx + at, (dz * (distribution + value * density)).to(dx.dtype.element_ty), mask=there)
        dweight += gradient * xhat
        dbias += gradient
    store_part(parts, 0, dweight, own_column, WIDTH)
    store_part(parts, 1, dbias, own_column, WIDTH)


@triton.jit(do_not_specialize=["rows", "tiles", "tiles_per_part"])
def head_scale_layer_norm_backward(
    dx,
    parts,
    dout,
    x,
    head_scale,
    stats,
    weight,
    rows,
    tiles,
    tiles_per_part,
    HEAD_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The third part is that of dhead_scale, per column: a head's columns are still to be added."""
    part = tl.program_id(0)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    dscale = tl.zeros([ROWS, BLOCK], tl.float32)
    own_column = tl.arange(0, BLOCK)
    factor = load_columns(weight, own_column, WIDTH)
    scale = tl.load(head_scale + own_column // HEAD_WIDTH, mask=own_column < WIDTH, other=0.0)[None, :]
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, tiles)):
        row, column, there, at = tile_of(tile, rows, WIDTH, BLOCK, ROWS)
        mean, rstd = load_stats(stats, row, rows)
        gradient = load_tile(dout, at, there)
        value = load_tile(x, at, there)
        xhat = tl.where(there, (value * scale - mean) * rstd, 0.0)
        a, b = row_means(gradient, xhat, factor, WIDTH)
        dz = rstd * (gradient * factor - a - xhat * b)
        tl.store(dx + at, (dz * scale).to(dx.dtype.element_ty), mask=there)
        dweight += gradient * xhat
        dbias += gradient
        dscale += dz * value
    store_part(parts, 0, dweight, own_column, WIDTH)
    store_part(parts, 1, dbias, own_column, WIDTH)
    store_part(parts, 2, dscale, own_column, WIDTH)


@triton.jit(do_not_specialize=["rows", "entries", "type_entries", "tiles", "tiles_per_part"])
def embed_layer_norm_backward(
    means,
    parts,
    dout,
    tokens,
    table,
    types,
    type_table,
    stats,
    weight,
    rows,
    entries,
    type_entries,
    scale,
    tiles,
    tiles_per_part,
    TYPED: tl.constexpr,
    ONE_TYPE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """means f32 [rows, 2]: mean(g) and mean(g * xhat), from which tables.py has dz again. The third part (with one type
    for all rows) is that type's gradient."""
    part = tl.program_id(0)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    dtype = tl.zeros([ROWS, BLOCK], tl.float32)
    own_column = tl.arange(0, BLOCK)
    factor = load_columns(weight, own_column, WIDTH)
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, tiles)):
        row, column, there, at = tile_of(tile, rows, WIDTH, BLOCK, ROWS)
        mean, rstd = load_stats(stats, row, rows)
        gradient = load_tile(dout, at, there)
        token = tl.load(tokens + row, mask=row < rows, other=0)
        z = load_entries(table, token, entries, column, there, WIDTH) * scale
        if ONE_TYPE:
            z += load_columns(type_table, column, WIDTH).to(tl.float32)
        elif TYPED:
            kind = tl.load(types + row, mask=row < rows, other=0)
            z += load_entries(type_table, kind, type_entries, column, there, WIDTH)
        xhat = tl.where(there, (z - mean) * rstd, 0.0)
        a, b = row_means(gradient, xhat, factor, WIDTH)
        own = means + 2 * row.to(tl.int64)[:, None]
        tl.store(own, a, mask=(row < rows)[:, None])
        tl.store(own + 1, b, mask=(row < rows)[:, None])
        if ONE_TYPE:
            dtype += tl.where(there, rstd * (gradient * factor - a - xhat * b), 0.0)
        dweight += gradient * xhat
        dbias += gradient
    store_part(parts, 0, dweight, own_column, WIDTH)
    store_part(parts, 1, dbias, own_column, WIDTH)
    if ONE_TYPE:
        store_part(parts, 2, dtype, own_column, WIDTH)

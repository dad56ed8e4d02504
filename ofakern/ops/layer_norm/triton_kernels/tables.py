"""The gradient of an embedding table: a program owns an entry's columns and adds its rows in their order.

`order` lists the rows sorted by entry (stable), `offsets` [entries + 1] where each entry's begin. A row's dz comes from
its statistics and the two means that the backward kernel left, so dz itself is never stored.
"""

import triton
import triton.language as tl

from ofakern.ops.layer_norm.triton_kernels.rows import load_entries
from ofakern.ops.triton_device import load_columns


@triton.jit(do_not_specialize=["other_entries"])
def embed_layer_norm_table(
    down,
    own,
    own_factor,
    other,
    other_index,
    other_factor,
    other_entries,
    order,
    offsets,
    dout,
    stats,
    means,
    weight,
    OTHER: tl.constexpr,
    OTHER_INDEX: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """down [entries, WIDTH]: own_factor times the sum of dz over the entry's rows, of z = own_factor * own[entry] +
    other_factor * other[other_index[row]] (row 0 of `other` without an index)."""
    entry = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide = (column < WIDTH)[None, :]
    at = entry.to(tl.int64) * WIDTH + column
    base = tl.load(own + at, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :] * own_factor
    factor = load_columns(weight, column, WIDTH)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    begin, end = tl.load(offsets + entry), tl.load(offsets + entry + 1)
    for first in range(begin, end, ROWS):
        slot = first + tl.arange(0, ROWS)
        valid = slot < end
        row = tl.load(order + slot, mask=valid, other=0)
        there = valid[:, None] & wide
        z = base
        if OTHER_INDEX:
            index = tl.load(other_index + row, mask=valid, other=0)
            z += load_entries(other, index, other_entries, column, there, WIDTH) * other_factor
        elif OTHER:
            z += load_columns(other, column, WIDTH).to(tl.float32) * other_factor
        mean = tl.load(stats + 2 * row, mask=valid, other=0.0)[:, None]
        rstd = tl.load(stats + 2 * row + 1, mask=valid, other=0.0)[:, None]
        a = tl.load(means + 2 * row, mask=valid, other=0.0)[:, None]
        b = tl.load(means + 2 * row + 1, mask=valid, other=0.0)[:, None]
        gradient = tl.load(dout + row[:, None] * WIDTH + column[None, :], mask=there, other=0.0).to(tl.float32)
        dz = rstd * (gradient * factor - a - (z - mean) * rstd * b)
        total += tl.where(there, dz, 0.0)
    tl.store(down + at, (tl.sum(total, 0) * own_factor).to(down.dtype.element_ty), mask=column < WIDTH)

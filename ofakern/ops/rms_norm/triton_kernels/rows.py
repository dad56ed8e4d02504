"""Forward: a program per tile of rows writes out and 1 / root mean square, f32 [rows].

Backward: a program owns a run of tiles, whose rows of dx it writes; its sum over them is one part of dweight.
With xhat = x * rstd, g = dout * weight: dx = rstd * (g - xhat * mean(g * xhat)),
dweight = sum over rows of dout * xhat.
"""

import triton
import triton.language as tl

from ofakern.ops.triton_device import load_columns, load_tile, store_part, tile_of


@triton.jit(do_not_specialize=["rows"])
def rms_norm_forward(
    out,
    rstds,
    x,
    weight,
    rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, column, there, at = tile_of(tl.program_id(0), rows, WIDTH, BLOCK, ROWS)
    value = load_tile(x, at, there)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value, 1) * (1.0 / WIDTH) + eps))
    normed = value * rstd[:, None] * load_columns(weight, column, WIDTH)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=there)
    tl.store(rstds + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "tiles", "tiles_per_part"])
def rms_norm_backward(
    dx,
    parts,
    dout,
    x,
    rstds,
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
    own_column = tl.arange(0, BLOCK)
    factor = load_columns(weight, own_column, WIDTH)
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, tiles)):
        row, column, there, at = tile_of(tile, rows, WIDTH, BLOCK, ROWS)
        rstd = tl.load(rstds + row, mask=row < rows, other=0.0)[:, None]
        gradient = load_tile(dout, at, there)
        xhat = load_tile(x, at, there) * rstd
        g = gradient * factor
        dz = rstd * (g - xhat * (tl.sum(g * xhat, 1)[:, None] * (1.0 / WIDTH)))
        tl.store(dx + at, dz.to(dx.dtype.element_ty), mask=there)
        dweight += gradient * xhat
    store_part(parts, 0, dweight, own_column, WIDTH)

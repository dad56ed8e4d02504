"""The folded weight, and the kernels that own whole rows: tokens, and their gradient before LayerNorm."""

import triton
import triton.language as tl

from ofakern.ops.patch_embed.triton_kernels.pixels import open_tile, pixel_tile


@triton.jit
def patch_embed_fold(
    folded,
    vector,
    weight,
    channels,
    bias,
    type_embedding,
    CHANNELS: tl.constexpr,
    VOLUME: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIAS: tl.constexpr,
    TYPE: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    LD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """folded [programs, LD]: weight times its channel's ratio, in the order of packed pixels, 0 outside; vector f32:
    bias, type and what the pixels' offsets add, summed with the weights as they were rounded, so that a rounding counts
    as much as it would with normalised pixels. channels f32 [4, C]: ratio, offset / ratio, scale, offset."""
    d = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, LD, BLOCK):
        k = first + tl.arange(0, BLOCK)
        # Not `&` of a block and a number: triton 3.9's interpreter takes the result for no mask.
        inside = k < tl.where(d < WIDTH, DEPTH, 0)
        if INTERLEAVED:
            channel = k % CHANNELS
            native = channel * VOLUME + k // CHANNELS
        else:
            channel, native = k // VOLUME, k
        own = tl.load(weight + d.to(tl.int64) * DEPTH + native, mask=inside, other=0.0).to(tl.float32)
        ratio = tl.load(channels + channel, mask=inside, other=0.0)
        constant = tl.load(channels + CHANNELS + channel, mask=inside, other=0.0)
        rounded = (own * ratio).to(folded.dtype.element_ty)
        tl.store(folded + d.to(tl.int64) * LD + k, rounded, mask=k < LD)
        total += rounded.to(tl.float32) * constant
    entry = tl.sum(total, 0)
    if BIAS:
        entry += tl.load(bias + d, mask=d < WIDTH, other=0.0)
    if TYPE:
        entry += tl.load(type_embedding + d, mask=d < WIDTH, other=0.0)
    tl.store(vector + d, entry)


@triton.jit
def add_positions(
    value,
    position,
    position_index,
    number,
    there,
    places,
    column,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """value plus each token's row of the table; NaN for an index that is none, which is not read."""
    place = number
    if INDEX:
        place = tl.load(position_index + tl.arange(0, BLOCK_N), mask=there, other=0)
    inside = (place >= 0) & (place < places)
    row = position + place.to(tl.int64) * WIDTH
    value += tl.load(
        row[:, None] + column[None, :], mask=(there & inside)[:, None] & (column < WIDTH)[None, :], other=0.0
    ).to(tl.float32)
    return tl.where(inside[:, None], value, float("nan"))


@triton.jit
def merge(mean, spread, count, value, there, width):
    """Mean and sum of squares about it of `count` columns and `width` more (Chan et al.); there: which these are."""
    own_count = tl.maximum(width, 0).to(tl.float32)
    own_mean = tl.sum(tl.where(there[None, :], value, 0.0), 1) / tl.maximum(own_count, 1.0)
    centred = tl.where(there[None, :], value - own_mean[:, None], 0.0)
    both = count + own_count
    step = own_mean - mean
    spread += tl.sum(centred * centred, 1) + step * step * (count * own_count / both)
    return mean + step * (own_count / both), spread, both


@triton.jit
def write_columns(
    y,
    product,
    first,
    mean,
    spread,
    count,
    number,
    there,
    vector,
    scale,
    position,
    position_index,
    places,
    POSITION: tl.constexpr,
    INDEX: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finishes and writes BLOCK columns from `first` on; gives the statistics with these."""
    column = first + tl.arange(0, BLOCK)
    wide = column < WIDTH
    value = product * scale + tl.load(vector + column)[None, :]
    if POSITION:
        value = add_positions(value, position, position_index, number, there, places, column, WIDTH, INDEX, BLOCK_N)
    own = y + (tl.arange(0, BLOCK_N)[:, None] * WIDTH + column[None, :])
    tl.store(own, value.to(y.dtype.element_ty), mask=there[:, None] & wide[None, :])
    if NORM:
        mean, spread, count = merge(mean, spread, count, value, wide, tl.minimum(WIDTH - first, BLOCK))
    return mean, spread, count


@triton.jit
def y_rows(
    y,
    base,
    number,
    there,
    t_stride,
    c_stride,
    h_stride,
    folded,
    vector,
    scale,
    position,
    position_index,
    places,
    eps,
    POSITION: tl.constexpr,
    INDEX: tl.constexpr,
    FRAMES: tl.constexpr,
    HEIGHT: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    LD: tl.constexpr,
    BYTES: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes the rows before LayerNorm to y, BLOCK_D columns at a time; gives their mean and 1 / deviation.

    y and position_index point to the tile's first token, so that offsets are 32 bits: more would spill."""
    mean = tl.zeros([BLOCK_N], tl.float32)
    spread = tl.zeros([BLOCK_N], tl.float32)
    count = 0.0
    for first in range(0, WIDTH, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for depth in range(0, LD, BLOCK_K):
            k = depth + tl.arange(0, BLOCK_K)
            a = pixel_tile(
                base, there, k, t_stride, c_stride, h_stride, folded, FRAMES, HEIGHT, RUN, DEPTH, BLOCK_K, BYTES
            )
            b = tl.load(folded + column[:, None] * LD + k[None, :])
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        # Half of the columns at a time: all of them with their positions would spill.
        low, high = tl.split(tl.permute(tl.reshape(total, (BLOCK_N, 2, BLOCK_D // 2)), (0, 2, 1)))
        mean, spread, count = write_columns(
            y, low, first, mean, spread, count, number, there, vector, scale, position, position_index, places,
            POSITION, INDEX, WIDTH, NORM, BLOCK_N, BLOCK_D // 2,
        )  # fmt: skip
        mean, spread, count = write_columns(
            y, high, first + BLOCK_D // 2, mean, spread, count, number, there, vector, scale, position, position_index,
            places, POSITION, INDEX, WIDTH, NORM, BLOCK_N, BLOCK_D // 2,
        )  # fmt: skip
    return mean, tl.div_rn(1.0, tl.sqrt_rn(spread * (1.0 / WIDTH) + eps))


@triton.jit(
    do_not_specialize=[
        "tiles", "n_stride", "t_stride", "c_stride", "h_stride", "rows", "columns", "per_image", "tokens", "places",
    ]
)  # fmt: skip
def patch_embed_forward(
    out,
    pixels,
    table,
    folded,
    vector,
    position,
    position_index,
    ln_weight,
    ln_bias,
    tiles,
    n_stride,
    t_stride,
    c_stride,
    h_stride,
    rows,
    columns,
    per_image,
    tokens,
    places,
    scale,
    eps,
    TABLE: tl.constexpr,
    POSITION: tl.constexpr,
    INDEX: tl.constexpr,
    NORM: tl.constexpr,
    FRAMES: tl.constexpr,
    HEIGHT: tl.constexpr,
    RUN: tl.constexpr,
    PATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    LD: tl.constexpr,
    BYTES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program owns BLOCK_N tokens: their rows, written unnormalised, are read back while they are in the cache."""
    first_token, number, there, corner, t_stride, c_stride, h_stride = open_tile(
        tl.program_id(0), table, tiles, n_stride, t_stride, c_stride, h_stride, rows, columns, per_image, tokens,
        TABLE, FRAMES, HEIGHT, PATCH, ALIGN, BLOCK_N,
    )  # fmt: skip
    out += first_token * WIDTH
    if INDEX:
        position_index += first_token
    mean, rstd = y_rows(
        out, pixels + corner, number, there, t_stride, c_stride, h_stride, folded, vector, scale, position,
        position_index, places, eps, POSITION, INDEX, FRAMES, HEIGHT, RUN, WIDTH, DEPTH, LD, BYTES, NORM, BLOCK_N,
        BLOCK_D, BLOCK_K,
    )  # fmt: skip
    if NORM:
        tl.debug_barrier()  # other threads wrote what this one reads
        for first in range(0, WIDTH, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C)
            inside = there[:, None] & (column < WIDTH)[None, :]
            own = out + (tl.arange(0, BLOCK_N)[:, None] * WIDTH + column[None, :])
            unit = (tl.load(own, mask=inside, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
            gain = tl.load(ln_weight + column, mask=column < WIDTH, other=0.0)[None, :]
            shift = tl.load(ln_bias + column, mask=column < WIDTH, other=0.0)[None, :]
            tl.store(own, (unit * gain + shift).to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "tiles", "n_stride", "t_stride", "c_stride", "h_stride", "rows", "columns", "per_image", "tokens", "places",
    ]
)  # fmt: skip
def patch_embed_row_gradient(
    dy,
    parts,
    dout,
    pixels,
    table,
    folded,
    vector,
    position,
    position_index,
    ln_weight,
    tiles,
    n_stride,
    t_stride,
    c_stride,
    h_stride,
    rows,
    columns,
    per_image,
    tokens,
    places,
    scale,
    eps,
    TABLE: tl.constexpr,
    POSITION: tl.constexpr,
    INDEX: tl.constexpr,
    FRAMES: tl.constexpr,
    HEIGHT: tl.constexpr,
    RUN: tl.constexpr,
    PATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    LD: tl.constexpr,
    BYTES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dy = rstd (g - mean g - unit mean(g unit)), g = dout gain; y is computed again and stands in dy meanwhile.

    parts f32 [3, tiles, WIDTH]: this tile's sums of dy, dout unit and dout."""
    tile = tl.program_id(0)
    first_token, number, there, corner, t_stride, c_stride, h_stride = open_tile(
        tile, table, tiles, n_stride, t_stride, c_stride, h_stride, rows, columns, per_image, tokens,
        TABLE, FRAMES, HEIGHT, PATCH, ALIGN, BLOCK_N,
    )  # fmt: skip
    dy += first_token * WIDTH
    dout += first_token * WIDTH
    if INDEX:
        position_index += first_token
    mean, rstd = y_rows(
        dy, pixels + corner, number, there, t_stride, c_stride, h_stride, folded, vector, scale, position,
        position_index, places, eps, POSITION, INDEX, FRAMES, HEIGHT, RUN, WIDTH, DEPTH, LD, BYTES, True, BLOCK_N,
        BLOCK_D, BLOCK_K,
    )  # fmt: skip
    tl.debug_barrier()  # other threads wrote what this one reads
    own_row = tl.arange(0, BLOCK_N)[:, None] * WIDTH
    sum_g = tl.zeros([BLOCK_N], tl.float32)
    sum_gu = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, WIDTH, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        inside = there[:, None] & (column < WIDTH)[None, :]
        unit, _, g = gradient_tile(dy, dout, own_row, column, inside, mean, rstd, ln_weight, WIDTH)
        sum_g += tl.sum(g, 1)
        sum_gu += tl.sum(g * unit, 1)
    sum_g *= 1.0 / WIDTH
    sum_gu *= 1.0 / WIDTH
    tl.debug_barrier()  # every thread has read y before dy takes its place
    for first in range(0, WIDTH, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        wide = column < WIDTH
        inside = there[:, None] & wide[None, :]
        unit, outer, g = gradient_tile(dy, dout, own_row, column, inside, mean, rstd, ln_weight, WIDTH)
        own = tl.where(inside, rstd[:, None] * (g - sum_g[:, None] - unit * sum_gu[:, None]), 0.0)
        tl.store(dy + (own_row + column[None, :]), own.to(dy.dtype.element_ty), mask=inside)
        part = parts + tile.to(tl.int64) * WIDTH + column
        step = tl.num_programs(0).to(tl.int64) * WIDTH
        tl.store(part, tl.sum(own, 0), mask=wide)
        tl.store(part + step, tl.sum(outer * unit, 0), mask=wide)
        tl.store(part + 2 * step, tl.sum(outer, 0), mask=wide)


@triton.jit
def gradient_tile(y, dout, row, column, inside, mean, rstd, ln_weight, WIDTH: tl.constexpr):
    """(unit, dout, dout times gain) of some columns, 0 outside."""
    value = tl.load(y + (row + column[None, :]), mask=inside, other=0.0).to(tl.float32)
    unit = tl.where(inside, (value - mean[:, None]) * rstd[:, None], 0.0)
    outer = tl.load(dout + (row + column[None, :]), mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(ln_weight + column, mask=column < WIDTH, other=0.0)[None, :]
    return unit, outer, outer * gain

"""What the kernels do with a tile of whole rows (ops/triton_rows.py): statistics, dropout, entries of a table."""

import triton
import triton.language as tl

from ofakern.ops.triton_device import dropout_key, keep_of_words, load_columns, philox


@triton.jit
def load_stats(stats, row, rows):
    """mean and 1 / deviation, [ROWS, 1] each."""
    at = stats + 2 * row.to(tl.int64)
    mean = tl.load(at, mask=row < rows, other=0.0)
    rstd = tl.load(at + 1, mask=row < rows, other=0.0)
    return mean[:, None], rstd[:, None]


@triton.jit
def normalise(z, row, column, there, at, rows, out, stats, weight, bias, eps, WIDTH: tl.constexpr):
    """Writes out and stats of rows z (0 outside): the variance is that of centred values."""
    mean = tl.sum(z, 1) * (1.0 / WIDTH)
    centred = tl.where(there, z - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) * (1.0 / WIDTH)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    normed = centred * rstd[:, None] * load_columns(weight, column, WIDTH) + load_columns(bias, column, WIDTH)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=there)
    statistic = stats + 2 * row.to(tl.int64)
    tl.store(statistic, mean, mask=row < rows)
    tl.store(statistic + 1, rstd, mask=row < rows)


@triton.jit
def row_means(dout, xhat, weight, WIDTH: tl.constexpr):
    """mean(g) and mean(g * xhat), [ROWS, 1], of g = dout * weight."""
    g = dout * weight
    return tl.sum(g, 1)[:, None] * (1.0 / WIDTH), tl.sum(g * xhat, 1)[:, None] * (1.0 / WIDTH)


@triton.jit
def row_keep(seed, row, threshold, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """bool [ROWS, BLOCK]: word (column mod 4) of Philox at (column / 4, row, 0, 2^32 - 1) is at least threshold.

    BLOCK is at least 4.
    """
    key0, key1 = dropout_key(seed)
    zero = tl.zeros([ROWS, BLOCK // 4], tl.uint32)
    w0, w1, w2, w3 = philox(
        zero + tl.arange(0, BLOCK // 4).to(tl.uint32)[None, :],
        zero + row.to(tl.uint32)[:, None],
        zero,
        zero + 0xFFFFFFFF,
        key0,
        key1,
    )
    return keep_of_words(w0, w1, w2, w3, threshold.to(tl.uint32), ROWS, BLOCK)


@triton.jit
def load_entries(table, index, entries, column, there, WIDTH: tl.constexpr):
    """Rows [ROWS, BLOCK] of table [entries, WIDTH]; NaN for an index that is none, which is not read."""
    inside = ((index >= 0) & (index < entries))[:, None]
    at = index.to(tl.int64)[:, None] * WIDTH + column[None, :]
    value = tl.load(table + at, mask=there & inside, other=0.0).to(tl.float32)
    return tl.where(there & (inside == 0), float("nan"), value)

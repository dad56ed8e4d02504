"""Products whose rows are found, and left, where a permutation says; an index that is none is left alone."""

import triton
import triton.language as tl


@triton.jit
def _rows_of(place, there, index, rows, INDEX: tl.constexpr):
    """(row int64, valid) of places: index[place], or the place itself."""
    if INDEX:
        row = tl.load(index + place, mask=there, other=-1)
        valid = there & (row >= 0) & (row < rows)
    else:
        row, valid = place.to(tl.int64), there
    return row, valid


@triton.jit(do_not_specialize=["tokens", "rows"])
def routed_rows(
    out,
    out_index,
    given,
    given_index,
    weight,
    bias,
    tokens,
    rows,
    OUT_INDEX: tl.constexpr,
    GIVEN_INDEX: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """out[out_index[p], o] = sum over w of given[given_index[p], w] weight[o, w] + bias[o] for an expert's places p;
    weight is [OUT, WIDTH], or [WIDTH, OUT] where TRANSPOSED."""
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    there, wide = place < tokens, column < OUT
    row, valid = _rows_of(place, there, given_index, rows, GIVEN_INDEX)
    base = given + row[:, None] * WIDTH
    total = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for first in range(0, WIDTH, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        inside = w < WIDTH
        a = tl.load(base + w[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        if TRANSPOSED:
            b = tl.load(weight + w[:, None] * OUT + column[None, :], mask=inside[:, None] & wide[None, :], other=0.0)
        else:
            at = column[:, None] * WIDTH + w[None, :]
            b = tl.trans(tl.load(weight + at, mask=wide[:, None] & inside[None, :], other=0.0))
        total = tl.dot(a, b, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + column, mask=wide, other=0.0).to(tl.float32)[None, :]
    target, kept = _rows_of(place, there, out_index, rows, OUT_INDEX)
    pointer = out + target[:, None] * OUT + column[None, :]
    tl.store(pointer, total.to(out.dtype.element_ty), mask=kept[:, None] & wide[None, :])


@triton.jit(do_not_specialize=["tokens", "rows"])
def routed_weights(
    dweight,
    dbias,
    dy,
    dy_index,
    x,
    x_index,
    tokens,
    rows,
    DY_INDEX: tl.constexpr,
    X_INDEX: tl.constexpr,
    BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dweight[o, w] = sum over an expert's places of dy[.., o] x[.., w], in their order; dbias[o] = sum of dy[.., o].
    Zeros for an expert without tokens."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    high, wide = o < OUT, w < WIDTH
    total = tl.zeros([BLOCK_O, BLOCK_W], tl.float32)
    bias_total = tl.zeros([BLOCK_O], tl.float32)
    for first in range(0, tokens, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        there = place < tokens
        row, valid = _rows_of(place, there, dy_index, rows, DY_INDEX)
        a = tl.load(dy + row[:, None] * OUT + o[None, :], mask=valid[:, None] & high[None, :], other=0.0)
        row, valid = _rows_of(place, there, x_index, rows, X_INDEX)
        b = tl.load(x + row[:, None] * WIDTH + w[None, :], mask=valid[:, None] & wide[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
        if BIAS:
            bias_total += tl.sum(a.to(tl.float32), 0)
    pointer = dweight + o[:, None] * WIDTH + w[None, :]
    tl.store(pointer, total.to(dweight.dtype.element_ty), mask=high[:, None] & wide[None, :])
    if BIAS:
        if tl.program_id(1) == 0:
            tl.store(dbias + o, bias_total.to(dbias.dtype.element_ty), mask=high)

"""Scores of a tile of tokens and ids, and which of them a token allows."""

import triton
import triton.language as tl

ALL = tl.constexpr(0)
RANGE = tl.constexpr(1)
MASK = tl.constexpr(2)


@triton.jit
def score_tile(
    hidden,
    weight,
    bias,
    there,
    valid,
    BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """f32 [BLOCK_N, BLOCK_V] of hidden . weight + bias, which point to the tile's first token and id (so that offsets
    are 32 bits: 64 of them per thread would spill); anything outside `there` and `valid`."""
    score = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    rows = tl.arange(0, BLOCK_N)[:, None] * WIDTH
    columns = tl.arange(0, BLOCK_V)[:, None] * WIDTH
    for first in range(0, WIDTH, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        if WIDTH % BLOCK_D == 0:
            a = tl.load(hidden + (rows + d), mask=there[:, None], other=0.0)
            b = tl.load(weight + (columns + d), mask=valid[:, None], other=0.0)
        else:
            a = tl.load(hidden + (rows + d), mask=there[:, None] & (d < WIDTH), other=0.0)
            b = tl.load(weight + (columns + d), mask=valid[:, None] & (d < WIDTH), other=0.0)
        score = tl.dot(a, tl.trans(b), score, input_precision="ieee")
    if BIAS:
        score += tl.load(bias + tl.arange(0, BLOCK_V), mask=valid, other=0.0).to(tl.float32)[None, :]
    return score


@triton.jit
def allowed_tile(
    ranges,
    range_stride,
    always,
    mask,
    vocabulary,
    there,
    ident,
    valid,
    ALLOWED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """bool [BLOCK_N, BLOCK_V]; ranges and mask point to the tile's first token, mask to its first id too."""
    row = tl.arange(0, BLOCK_N)
    allowed = there[:, None] & valid[None, :]
    if ALLOWED == RANGE:
        lo = tl.load(ranges + row * range_stride, mask=there, other=0)
        hi = tl.load(ranges + row * range_stride + 1, mask=there, other=0)
        allowed = allowed & (
            (ident < always)[None, :] | ((ident[None, :] >= lo[:, None]) & (ident[None, :] < hi[:, None]))
        )
    elif ALLOWED == MASK:
        at = row[:, None] * vocabulary + tl.arange(0, BLOCK_V)[None, :]
        allowed = allowed & (tl.load(mask + at, mask=allowed, other=0) != 0)
    return allowed


@triton.jit
def meets_tile(
    ranges,
    range_stride,
    always,
    mask,
    vocabulary,
    there,
    first,
    valid,
    ALLOWED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Whether a token of the tile allows one of its ids from `first` on; pointers as for allowed_tile."""
    row = tl.arange(0, BLOCK_N)
    if ALLOWED == RANGE:
        lo = tl.load(ranges + row * range_stride, mask=there, other=0)
        hi = tl.load(ranges + row * range_stride + 1, mask=there, other=0)
        meets = (first < always) | (tl.max(((lo < first + BLOCK_V) & (hi > first) & (hi > lo)).to(tl.int32), 0) != 0)
    else:
        at = row[:, None] * vocabulary + tl.arange(0, BLOCK_V)[None, :]
        marks = tl.load(mask + at, mask=there[:, None] & valid[None, :], other=0)
        meets = tl.max(tl.max(marks.to(tl.int32), 1), 0) != 0
    return meets


@triton.jit(do_not_specialize=["vocabulary"])
def cross_entropy_allow(mask, offsets, ids, vocabulary, BLOCK: tl.constexpr):
    """A program per token marks the ids of its row of the CSR table in mask uint8 [tokens, vocabulary], which is 0 at
    first; an empty row marks all."""
    token = tl.program_id(0)
    own = mask + token.to(tl.int64) * vocabulary
    begin, end = tl.load(offsets + token), tl.load(offsets + token + 1)
    one = tl.full([BLOCK], 1, tl.uint8)
    for first in range(begin, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        ident = tl.load(ids + slot, mask=slot < end, other=-1)
        tl.store(own + ident, one, mask=(ident >= 0) & (ident < vocabulary))
    if begin == end:
        for start in range(0, vocabulary, BLOCK):
            every = start + tl.arange(0, BLOCK)
            tl.store(own + every, one, mask=every < vocabulary)

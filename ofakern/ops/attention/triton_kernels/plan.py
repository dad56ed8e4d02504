"""Work lists, made on the device so that a call never waits for it: blocks of queries and keys, and what they meet.

A block never holds tokens of two samples. Their number is bounded by shapes alone (`n // size + samples`); blocks
beyond those in use are empty.
"""

import triton
import triton.language as tl

# Columns of a query block: sample, first row, end row, hull of its visible keys, hulls of its terms' active keys.
SAMPLE = tl.constexpr(0)
BEGIN = tl.constexpr(1)
END = tl.constexpr(2)
LO = tl.constexpr(3)
HI = tl.constexpr(4)
TERM = tl.constexpr(5)
QUERY_COLUMNS = tl.constexpr(9)
# Columns of a key block: sample, first key, end key, then the run of query blocks that may see it.
FIRST = tl.constexpr(3)
LAST = tl.constexpr(4)
KEY_COLUMNS = tl.constexpr(5)

_CHUNK = tl.constexpr(256)
_FAR = tl.constexpr(2**31 - 1)


@triton.jit
def _find_block(block, offsets, samples, SIZE: tl.constexpr):
    """(sample, begin, end) of a block when every sample is cut into blocks of SIZE tokens; begin == end beyond them."""
    sample, base, carry = 0, 0, 0
    for first in range(0, samples, _CHUNK):
        s = first + tl.arange(0, _CHUNK)
        there = s < samples
        begin = tl.load(offsets + s, mask=there, other=0)
        end = tl.load(offsets + s + 1, mask=there, other=0)
        ends = carry + tl.cumsum((end - begin + SIZE - 1) // SIZE, 0)
        before = there & (ends <= block)
        sample += tl.sum(before.to(tl.int32), 0)
        base = tl.maximum(base, tl.max(tl.where(before, ends, 0), 0))
        carry = tl.max(ends, 0)
    used = sample < samples
    end = tl.load(offsets + sample + 1, mask=used, other=0)
    begin = tl.load(offsets + sample, mask=used, other=0) + tl.where(used, (block - base) * SIZE, 0)
    return tl.where(used, sample, 0), begin, tl.minimum(begin + SIZE, end)


@triton.jit
def _store_hull(to, lo, hi):
    busy = hi > lo
    top = tl.max(tl.where(busy, hi, 0), 0)
    tl.store(to, tl.where(top > 0, tl.min(tl.where(busy, lo, _FAR), 0), 0))
    tl.store(to + 1, top)


@triton.jit(do_not_specialize=["samples"])
def plan_queries(plan, visible, same0, same1, q_offsets, samples, TERMS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """plan int32 [blocks, QUERY_COLUMNS]; one program per block."""
    block = tl.program_id(0)
    sample, begin, end = _find_block(block, q_offsets, samples, BLOCK_Q)
    to = plan + block * QUERY_COLUMNS
    tl.store(to + SAMPLE, sample)
    tl.store(to + BEGIN, begin)
    tl.store(to + END, end)
    row = begin + tl.arange(0, BLOCK_Q)
    there = row < end
    lo = tl.load(visible + 2 * row, mask=there, other=0)
    hi = tl.load(visible + 2 * row + 1, mask=there, other=0)
    _store_hull(to + LO, lo, hi)
    for term in tl.static_range(2):
        term_lo, term_hi = lo, lo  # an absent term is active nowhere
        if term < TERMS:
            same = same0 if term == 0 else same1
            term_lo = tl.maximum(lo, tl.load(same + 2 * row, mask=there, other=0))
            term_hi = tl.minimum(hi, tl.load(same + 2 * row + 1, mask=there, other=0))
        _store_hull(to + TERM + 2 * term, term_lo, term_hi)


@triton.jit(do_not_specialize=["samples", "query_blocks"])
def plan_keys(plan, query_plan, k_offsets, samples, query_blocks, BLOCK_K: tl.constexpr):
    """plan int32 [blocks, KEY_COLUMNS]; one program per block."""
    block = tl.program_id(0)
    sample, begin, end = _find_block(block, k_offsets, samples, BLOCK_K)
    first, last = _FAR, 0
    for start in range(0, query_blocks, _CHUNK):
        b = start + tl.arange(0, _CHUNK)
        there = b < query_blocks
        lo = tl.load(query_plan + b * QUERY_COLUMNS + LO, mask=there, other=0)
        hi = tl.load(query_plan + b * QUERY_COLUMNS + HI, mask=there, other=0)
        meets = (lo < end) & (hi > begin) & (lo < hi) & (begin < end)
        first = tl.minimum(first, tl.min(tl.where(meets, b, _FAR), 0))
        last = tl.maximum(last, tl.max(tl.where(meets, b + 1, 0), 0))
    to = plan + block * KEY_COLUMNS
    tl.store(to + SAMPLE, sample)
    tl.store(to + BEGIN, begin)
    tl.store(to + END, end)
    tl.store(to + FIRST, first)
    tl.store(to + LAST, last)

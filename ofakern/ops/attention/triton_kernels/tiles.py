"""What the kernels share: rows of packed tensors, one tile of relative bias, dropout's bits."""

import triton
import triton.language as tl

from ofakern.ops.triton_device import INTERPRETED, LOG2E, keep_of_words, philox


@triton.jit
def load_rows(base, row, stride, there, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] of one head of a packed [N, H, WIDTH] tensor; 0 where not `there` and beyond WIDTH."""
    column = tl.arange(0, BLOCK)
    pointer = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    if BLOCK == WIDTH:
        tile = tl.load(pointer, mask=there[:, None], other=0.0)
    else:
        tile = tl.load(pointer, mask=there[:, None] & (column < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(base, row, stride, there, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    pointer = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    if BLOCK == WIDTH:
        tl.store(pointer, tile.to(base.dtype.element_ty), mask=there[:, None])
    else:
        tl.store(pointer, tile.to(base.dtype.element_ty), mask=there[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _gather(pointer, active):
    """f32 at the pointers, 0 where not active.

    A tl.load of a tile takes a layout of its own, and every tile of scores would travel through shared memory to it and
    back (half as many instructions again in the forward kernel). This load takes the layout that the products have.
    The predicate is read before $0 is written: the two may share a register.
    """
    if INTERPRETED:  # which knows no assembly
        value = tl.load(pointer, mask=active, other=0.0)
    else:
        value = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.u32 p, $2, 0; mov.f32 $0, 0f00000000; @p ld.global.nc.f32 $0, [$1]; }",
            "=f,l,r",
            [pointer.to(tl.int64), active.to(tl.uint32)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return value


@triton.jit
def add_term(score, table, q_coord, k_coord, same_lo, same_hi, key, visible, meets):
    """Adds table[q_coord - k_coord] (base 2) where the term is active; shapes broadcast to the tile's.

    Coordinates of inactive pairs may be any integers: their difference may wrap and is not read.
    """
    if meets:
        active = visible & (key >= same_lo) & (key < same_hi)
        row = tl.sub(q_coord, k_coord, sanitize_overflow=False)
        score += _gather(table + row, active) * LOG2E
    return score


@triton.jit
def keep_mask(
    key0, key1, row, head, sample, first, threshold, ROWS: tl.constexpr, KEYS: tl.constexpr, ALIGNED: tl.constexpr
):
    """bool [ROWS, KEYS]: which probabilities survive. row: positions inside the sample, first: that of the first key.

    ALIGNED: first is a multiple of four, so that one Philox call serves four neighbouring keys.
    """
    PER_CALL: tl.constexpr = 4 if ALIGNED else 1
    local = tl.add(first, tl.arange(0, KEYS // PER_CALL) * PER_CALL, sanitize_overflow=False).to(tl.uint32)
    zero = tl.zeros([ROWS, KEYS // PER_CALL], tl.uint32)
    w0, w1, w2, w3 = philox(
        zero + (local >> 2)[None, :],
        zero + row.to(tl.uint32)[:, None],
        zero + head.to(tl.uint32),
        zero + sample.to(tl.uint32),
        key0,
        key1,
    )
    limit = threshold.to(tl.uint32)
    if ALIGNED:
        keep = keep_of_words(w0, w1, w2, w3, limit, ROWS, KEYS)
    else:
        lane = (local & 3)[None, :]
        low = tl.where(lane == 0, w0, w1)
        high = tl.where(lane == 2, w2, w3)
        keep = tl.where(lane < 2, low, high) >= limit
    return keep

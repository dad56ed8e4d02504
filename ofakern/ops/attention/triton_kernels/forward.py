"""Forward: a program per query block and head walks the keys in the hull of its intervals (online softmax, base 2)."""

import triton
import triton.language as tl

from ofakern.ops.attention.triton_kernels.plan import BEGIN, END, HI, LO, QUERY_COLUMNS, SAMPLE, TERM
from ofakern.ops.attention.triton_kernels.tiles import add_term, keep_mask, load_rows, store_rows
from ofakern.ops.triton_device import LN2, dropout_key


@triton.jit(do_not_specialize=["rows0", "rows1", "threshold"])
def attention_forward(
    out,
    lse,
    plan,
    q,
    k,
    v,
    q_pos,
    k_pos,
    table0,
    q_coord0,
    k_coord0,
    same0,
    table1,
    q_coord1,
    k_coord1,
    same1,
    head_scale,
    seed,
    visible,
    q_offsets,
    k_offsets,
    key_seen,
    q_stride,
    q_head,
    k_stride,
    k_head,
    v_stride,
    v_head,
    q_pos_stride,
    q_pos_head,
    k_pos_stride,
    k_pos_head,
    rows0,
    rows1,
    heads,
    score_scale,
    keep_scale,
    threshold,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE: tl.constexpr,
    POS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_POS: tl.constexpr,
    TERMS: tl.constexpr,
    HEAD_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [Nq,H,V], lse f32 [Nq,H]: every row of the block is written."""
    work = plan + tl.program_id(0) * QUERY_COLUMNS
    head = tl.program_id(1)
    group = head // GROUP
    begin, end = tl.load(work + BEGIN), tl.load(work + END)
    hull_lo, hull_hi = tl.load(work + LO), tl.load(work + HI)
    row = begin + tl.arange(0, BLOCK_Q)
    there = row < end
    lo = tl.load(visible + 2 * row, mask=there, other=0)
    hi = tl.load(visible + 2 * row + 1, mask=there, other=0)
    has_key = hi > lo
    q_tile = load_rows(q + head * q_head, row, q_stride, has_key, WIDTH, BLOCK_WIDTH)
    if POS > 0:
        q_pos_tile = load_rows(q_pos + head * q_pos_head, row, q_pos_stride, has_key, POS, BLOCK_POS)
    if TERMS > 0:
        coord0 = tl.load(q_coord0 + row, mask=there, other=0)
        same_lo0 = tl.load(same0 + 2 * row, mask=there, other=0)
        same_hi0 = tl.load(same0 + 2 * row + 1, mask=there, other=0)
        term_lo0, term_hi0 = tl.load(work + TERM), tl.load(work + TERM + 1)
    if TERMS > 1:
        coord1 = tl.load(q_coord1 + row, mask=there, other=0)
        same_lo1 = tl.load(same1 + 2 * row, mask=there, other=0)
        same_hi1 = tl.load(same1 + 2 * row + 1, mask=there, other=0)
        term_lo1, term_hi1 = tl.load(work + TERM + 2), tl.load(work + TERM + 3)
    start = hull_lo
    if DROPOUT:
        sample = tl.load(work + SAMPLE)
        row_local = row - tl.load(q_offsets + sample)
        key_origin = tl.load(k_offsets + sample)
        start = hull_lo - ((hull_lo - key_origin) & 3)  # groups of four keys share their random words
        seed0, seed1 = dropout_key(seed)

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_VALUE], tl.float32)
    for first in range(start, hull_hi, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        inside = (key >= hull_lo) & (key < hull_hi)
        seen = tl.load(key_seen + key, mask=inside, other=0) != 0
        k_tile = load_rows(k + group * k_head, key, k_stride, seen, WIDTH, BLOCK_WIDTH)
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if POS > 0:
            k_pos_tile = load_rows(k_pos + group * k_pos_head, key, k_pos_stride, seen, POS, BLOCK_POS)
            score = tl.dot(q_pos_tile, tl.trans(k_pos_tile), score, input_precision="ieee")
        score *= score_scale
        visible_tile = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
        if TERMS > 0:
            k_coord = tl.load(k_coord0 + key, mask=inside, other=0)
            score = add_term(
                score,
                table0 + head.to(tl.int64) * rows0,
                coord0[:, None],
                k_coord[None, :],
                same_lo0[:, None],
                same_hi0[:, None],
                key[None, :],
                visible_tile,
                (first < term_hi0) & (first + BLOCK_K > term_lo0),
            )
        if TERMS > 1:
            k_coord = tl.load(k_coord1 + key, mask=inside, other=0)
            score = add_term(
                score,
                table1 + head.to(tl.int64) * rows1,
                coord1[:, None],
                k_coord[None, :],
                same_lo1[:, None],
                same_hi1[:, None],
                key[None, :],
                visible_tile,
                (first < term_hi1) & (first + BLOCK_K > term_lo1),
            )
        score = tl.where(visible_tile, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key yet
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        if DROPOUT:
            first_local = first - key_origin
            keep = keep_mask(
                seed0, seed1, row_local, head, sample, first_local, threshold, BLOCK_Q, BLOCK_K, ALIGNED=True
            )
            weight = tl.where(keep, weight, 0.0)
        v_tile = load_rows(v + group * v_head, key, v_stride, seen, VALUE, BLOCK_VALUE)
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        top = new_top

    finite = total > 0.0
    factor = tl.where(finite, 1.0 / tl.where(finite, total, 1.0), 0.0)
    if DROPOUT:
        factor *= keep_scale
    if HEAD_SCALE:
        factor *= tl.load(head_scale + head)
    log_sum = tl.where(finite, (top + tl.log2(tl.where(finite, total, 1.0))) * LN2, float("-inf"))
    tl.store(lse + row.to(tl.int64) * heads + head, log_sum, mask=there)
    store_rows(out + head * VALUE, row, heads * VALUE, there, acc * factor[:, None], VALUE, BLOCK_VALUE)

"""Backward: dq by query block, then dk and dv by key block. Each gradient has one owner that adds in a fixed order.

Both recompute P = 2^(score - lse); ds = P * (M * c * dO.v - D) with D = rowsum(dO * out) - dlse, which the first kernel
leaves in `delta` for the second one and for the tables.
"""

import triton
import triton.language as tl

from ofakern.ops.attention.triton_kernels.plan import (
    BEGIN,
    END,
    FIRST,
    HI,
    KEY_COLUMNS,
    LAST,
    LO,
    QUERY_COLUMNS,
    SAMPLE,
    TERM,
)
from ofakern.ops.attention.triton_kernels.tiles import add_term, keep_mask, load_rows, store_rows
from ofakern.ops.triton_device import LOG2E, dropout_key


@triton.jit(do_not_specialize=["rows0", "rows1", "threshold"])
def attention_backward_queries(
    dq,
    dq_pos,
    delta,
    scale_parts,
    dout,
    dlse,
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
    dout_stride,
    dout_head,
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
    scale,
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
    LSE_GRADIENT: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dq, dq_pos, delta f32 [Nq,H], scale_parts f32 [blocks,H] (with HEAD_SCALE): all written."""
    block = tl.program_id(0)
    work = plan + block * QUERY_COLUMNS
    head = tl.program_id(1)
    group = head // GROUP
    begin, end = tl.load(work + BEGIN), tl.load(work + END)
    hull_lo, hull_hi = tl.load(work + LO), tl.load(work + HI)
    row = begin + tl.arange(0, BLOCK_Q)
    there = row < end
    lo = tl.load(visible + 2 * row, mask=there, other=0)
    hi = tl.load(visible + 2 * row + 1, mask=there, other=0)
    has_key = hi > lo
    statistic = row.to(tl.int64) * heads + head
    log_sum = tl.load(lse + statistic, mask=has_key, other=0.0) * LOG2E
    log_sum = tl.where(log_sum == float("-inf"), 0.0, log_sum)
    q_tile = load_rows(q + head * q_head, row, q_stride, has_key, WIDTH, BLOCK_WIDTH)
    dout_tile = load_rows(dout + head * dout_head, row, dout_stride, has_key, VALUE, BLOCK_VALUE)
    out_tile = load_rows(out + head * VALUE, row, heads * VALUE, has_key, VALUE, BLOCK_VALUE)
    row_delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if LSE_GRADIENT:
        row_delta -= tl.load(dlse + statistic, mask=has_key, other=0.0)
    tl.store(delta + statistic, row_delta, mask=there)
    dq_acc = tl.zeros([BLOCK_Q, BLOCK_WIDTH], tl.float32)
    if POS > 0:
        q_pos_tile = load_rows(q_pos + head * q_pos_head, row, q_pos_stride, has_key, POS, BLOCK_POS)
        dq_pos_acc = tl.zeros([BLOCK_Q, BLOCK_POS], tl.float32)
    factor = 1.0
    if DROPOUT:
        factor *= keep_scale
    if HEAD_SCALE:
        scale_gradient = tl.zeros([BLOCK_Q], tl.float32)
        head_factor = tl.load(head_scale + head)
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
        start = hull_lo - ((hull_lo - key_origin) & 3)
        seed0, seed1 = dropout_key(seed)

    for first in range(start, hull_hi, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        inside = (key >= hull_lo) & (key < hull_hi)
        seen = tl.load(key_seen + key, mask=inside, other=0) != 0
        k_tile = load_rows(k + group * k_head, key, k_stride, seen, WIDTH, BLOCK_WIDTH)
        v_tile = load_rows(v + group * v_head, key, v_stride, seen, VALUE, BLOCK_VALUE)
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
        prob = tl.where(visible_tile, tl.exp2(score - log_sum[:, None]), 0.0)
        dprob = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee") * factor
        if DROPOUT:
            first_local = first - key_origin
            keep = keep_mask(
                seed0, seed1, row_local, head, sample, first_local, threshold, BLOCK_Q, BLOCK_K, ALIGNED=True
            )
            dprob = tl.where(keep, dprob, 0.0)
        if HEAD_SCALE:
            # Not rowsum(dO * out) / c: that is 0 / 0 where c = 0.
            scale_gradient += tl.sum(prob * dprob, 1)
            dprob *= head_factor
        dscore = (prob * (dprob - row_delta[:, None])).to(k_tile.dtype)
        dq_acc = tl.dot(dscore, k_tile, dq_acc, input_precision="ieee")
        if POS > 0:
            dq_pos_acc = tl.dot(dscore, k_pos_tile, dq_pos_acc, input_precision="ieee")

    store_rows(dq + head * WIDTH, row, heads * WIDTH, there, dq_acc * scale, WIDTH, BLOCK_WIDTH)
    if POS > 0:
        store_rows(dq_pos + head * POS, row, heads * POS, there, dq_pos_acc * scale, POS, BLOCK_POS)
    if HEAD_SCALE:
        tl.store(scale_parts + block * heads + head, tl.sum(scale_gradient, 0))


@triton.jit(do_not_specialize=["rows0", "rows1", "threshold"])
def attention_backward_keys(
    dk,
    dv,
    dk_pos,
    delta,
    dout,
    lse,
    key_plan,
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
    dout_stride,
    dout_head,
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
    scale,
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
    """dk, dv, dk_pos of one key block and key head; tiles are transposed (keys x queries), as P and ds are used."""
    own = key_plan + tl.program_id(0) * KEY_COLUMNS
    group = tl.program_id(1)
    key_heads = heads // GROUP
    begin, end = tl.load(own + BEGIN), tl.load(own + END)
    key = begin + tl.arange(0, BLOCK_K)
    there = key < end
    seen = tl.load(key_seen + key, mask=there, other=0) != 0
    k_tile = load_rows(k + group * k_head, key, k_stride, seen, WIDTH, BLOCK_WIDTH)
    v_tile = load_rows(v + group * v_head, key, v_stride, seen, VALUE, BLOCK_VALUE)
    dk_acc = tl.zeros([BLOCK_K, BLOCK_WIDTH], tl.float32)
    dv_acc = tl.zeros([BLOCK_K, BLOCK_VALUE], tl.float32)
    if POS > 0:
        k_pos_tile = load_rows(k_pos + group * k_pos_head, key, k_pos_stride, seen, POS, BLOCK_POS)
        dk_pos_acc = tl.zeros([BLOCK_K, BLOCK_POS], tl.float32)
    if TERMS > 0:
        k_coord_tile0 = tl.load(k_coord0 + key, mask=there, other=0)
    if TERMS > 1:
        k_coord_tile1 = tl.load(k_coord1 + key, mask=there, other=0)
    if DROPOUT:
        seed0, seed1 = dropout_key(seed)
    first_block, last_block = tl.load(own + FIRST), tl.load(own + LAST)

    for member in range(GROUP):
        head = group * GROUP + member
        factor = 1.0
        if DROPOUT:
            factor *= keep_scale
        if HEAD_SCALE:
            factor *= tl.load(head_scale + head)
        for block in range(first_block, last_block):
            work = plan + block * QUERY_COLUMNS
            row_begin, row_end = tl.load(work + BEGIN), tl.load(work + END)
            row = row_begin + tl.arange(0, BLOCK_Q)
            row_there = row < row_end
            lo = tl.load(visible + 2 * row, mask=row_there, other=0)
            hi = tl.load(visible + 2 * row + 1, mask=row_there, other=0)
            has_key = hi > lo
            statistic = row.to(tl.int64) * heads + head
            log_sum = tl.load(lse + statistic, mask=has_key, other=0.0) * LOG2E
            log_sum = tl.where(log_sum == float("-inf"), 0.0, log_sum)
            row_delta = tl.load(delta + statistic, mask=has_key, other=0.0)
            q_tile = load_rows(q + head * q_head, row, q_stride, has_key, WIDTH, BLOCK_WIDTH)
            dout_tile = load_rows(dout + head * dout_head, row, dout_stride, has_key, VALUE, BLOCK_VALUE)
            score = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            if POS > 0:
                q_pos_tile = load_rows(q_pos + head * q_pos_head, row, q_pos_stride, has_key, POS, BLOCK_POS)
                score = tl.dot(k_pos_tile, tl.trans(q_pos_tile), score, input_precision="ieee")
            score *= score_scale
            visible_tile = (key[:, None] >= lo[None, :]) & (key[:, None] < hi[None, :]) & there[:, None]
            if TERMS > 0:
                coord = tl.load(q_coord0 + row, mask=row_there, other=0)
                same_lo = tl.load(same0 + 2 * row, mask=row_there, other=0)
                same_hi = tl.load(same0 + 2 * row + 1, mask=row_there, other=0)
                score = add_term(
                    score,
                    table0 + head.to(tl.int64) * rows0,
                    coord[None, :],
                    k_coord_tile0[:, None],
                    same_lo[None, :],
                    same_hi[None, :],
                    key[:, None],
                    visible_tile,
                    (begin < tl.load(work + TERM + 1)) & (end > tl.load(work + TERM)),
                )
            if TERMS > 1:
                coord = tl.load(q_coord1 + row, mask=row_there, other=0)
                same_lo = tl.load(same1 + 2 * row, mask=row_there, other=0)
                same_hi = tl.load(same1 + 2 * row + 1, mask=row_there, other=0)
                score = add_term(
                    score,
                    table1 + head.to(tl.int64) * rows1,
                    coord[None, :],
                    k_coord_tile1[:, None],
                    same_lo[None, :],
                    same_hi[None, :],
                    key[:, None],
                    visible_tile,
                    (begin < tl.load(work + TERM + 3)) & (end > tl.load(work + TERM + 2)),
                )
            prob = tl.where(visible_tile, tl.exp2(score - log_sum[None, :]), 0.0)
            dprob = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee") * factor
            weight = prob * factor
            if DROPOUT:
                sample = tl.load(work + SAMPLE)
                row_local = row - tl.load(q_offsets + sample)
                first_local = begin - tl.load(k_offsets + sample)
                # A query may see keys of another sample, whose first key need not lie at a multiple of four.
                if (first_local & 3) == 0:
                    keep = keep_mask(
                        seed0, seed1, row_local, head, sample, first_local, threshold, BLOCK_Q, BLOCK_K, ALIGNED=True
                    ).to(tl.int8)
                else:
                    keep = keep_mask(
                        seed0, seed1, row_local, head, sample, first_local, threshold, BLOCK_Q, BLOCK_K, ALIGNED=False
                    ).to(tl.int8)
                kept = tl.trans(keep) != 0
                weight = tl.where(kept, weight, 0.0)
                dprob = tl.where(kept, dprob, 0.0)
            dv_acc = tl.dot(weight.to(dout_tile.dtype), dout_tile, dv_acc, input_precision="ieee")
            dscore = (prob * (dprob - row_delta[None, :])).to(q_tile.dtype)
            dk_acc = tl.dot(dscore, q_tile, dk_acc, input_precision="ieee")
            if POS > 0:
                dk_pos_acc = tl.dot(dscore, q_pos_tile, dk_pos_acc, input_precision="ieee")

    store_rows(dk + group * WIDTH, key, key_heads * WIDTH, there, dk_acc * scale, WIDTH, BLOCK_WIDTH)
    store_rows(dv + group * VALUE, key, key_heads * VALUE, there, dv_acc, VALUE, BLOCK_VALUE)
    if POS > 0:
        store_rows(dk_pos + group * POS, key, key_heads * POS, there, dk_pos_acc * scale, POS, BLOCK_POS)

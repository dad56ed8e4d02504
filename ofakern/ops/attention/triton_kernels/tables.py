"""Gradients of the tables: each program adds up the scores of a run of query blocks, in order, without atomics.

A tile's ds [queries x keys] becomes sums per table row in two steps. A product with a one-hot matrix brings its columns
from keys to coordinates (keys may repeat or skip coordinates). Then row = q_coord - coordinate only differs by a shift
from query to query: a gather along each row of the tile lines the shifts up, and a sum over queries is left.
"""

import triton
import triton.language as tl

from ofakern.ops.attention.triton_kernels.plan import BEGIN, END, QUERY_COLUMNS, SAMPLE, TERM
from ofakern.ops.attention.triton_kernels.tiles import add_term, keep_mask, load_rows
from ofakern.ops.triton_device import LOG2E, dropout_key

_SMALLEST = tl.constexpr(-(2**31))
_LARGEST = tl.constexpr(2**31 - 1)


@triton.jit
def _add_tile(parts, dscore, active, q_coord, k_coord, rows, SPAN: tl.constexpr, RUN: tl.constexpr):
    """parts f32 [rows] += sums of dscore (0 where not active) by q_coord - k_coord."""
    q_used = tl.max(active.to(tl.int32), 1) != 0
    k_used = tl.max(active.to(tl.int32), 0) != 0
    # Coordinates of unused tokens may be anything; they must not widen the ranges.
    q_least = tl.min(tl.where(q_used, q_coord, _LARGEST), 0)
    q_most = tl.max(tl.where(q_used, q_coord, _SMALLEST), 0)
    k_least = tl.min(tl.where(k_used, k_coord, _LARGEST), 0)
    k_most = tl.max(tl.where(k_used, k_coord, _SMALLEST), 0)
    q_coord = tl.where(q_used, q_coord, q_least)
    k_coord = tl.where(k_used, k_coord, k_least)
    for coordinate in range(k_least, k_most + 1, SPAN):
        columns = coordinate + tl.arange(0, SPAN)
        one_hot = (k_coord[:, None] == columns[None, :]).to(dscore.dtype)
        sums = tl.dot(dscore, one_hot, input_precision="ieee")
        for run in range(q_least - coordinate - SPAN + 1, q_most - coordinate + 1, RUN):
            row = run + tl.arange(0, RUN)
            column = q_coord[:, None] - row[None, :] - coordinate
            hit = (column >= 0) & (column < SPAN)
            shifted = tl.gather(sums, tl.where(hit, column, 0), 1)
            found = tl.sum(tl.where(hit, shifted, 0.0), 0)
            there = (row >= 0) & (row < rows)
            tl.store(parts + row, tl.load(parts + row, mask=there, other=0.0) + found, mask=there)
            # The next run may overlap this one with other threads as owners.
            tl.debug_barrier()


@triton.jit(do_not_specialize=["rows0", "rows1", "threshold", "blocks", "blocks_per_part"])
def attention_backward_tables(
    parts,
    delta,
    dout,
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
    score_scale,
    keep_scale,
    threshold,
    blocks,
    blocks_per_part,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE: tl.constexpr,
    POS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_POS: tl.constexpr,
    TERMS: tl.constexpr,
    OWN: tl.constexpr,
    HEAD_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    RUN: tl.constexpr,
):
    """parts f32 [parts,H,R of term OWN], zero on entry: each program's own sums."""
    part = tl.program_id(0)
    head = tl.program_id(1)
    group = head // GROUP
    rows = rows1 if OWN else rows0
    parts += (part.to(tl.int64) * heads + head) * rows
    factor = 1.0
    if DROPOUT:
        factor *= keep_scale
        seed0, seed1 = dropout_key(seed)
    if HEAD_SCALE:
        factor *= tl.load(head_scale + head)
    for block in range(part * blocks_per_part, tl.minimum((part + 1) * blocks_per_part, blocks)):
        work = plan + block * QUERY_COLUMNS
        begin, end = tl.load(work + BEGIN), tl.load(work + END)
        row = begin + tl.arange(0, BLOCK_Q)
        there = row < end
        lo = tl.load(visible + 2 * row, mask=there, other=0)
        hi = tl.load(visible + 2 * row + 1, mask=there, other=0)
        has_key = hi > lo
        statistic = row.to(tl.int64) * heads + head
        log_sum = tl.load(lse + statistic, mask=has_key, other=0.0) * LOG2E
        log_sum = tl.where(log_sum == float("-inf"), 0.0, log_sum)
        row_delta = tl.load(delta + statistic, mask=has_key, other=0.0)
        q_tile = load_rows(q + head * q_head, row, q_stride, has_key, WIDTH, BLOCK_WIDTH)
        dout_tile = load_rows(dout + head * dout_head, row, dout_stride, has_key, VALUE, BLOCK_VALUE)
        if POS > 0:
            q_pos_tile = load_rows(q_pos + head * q_pos_head, row, q_pos_stride, has_key, POS, BLOCK_POS)
        coord0 = tl.load(q_coord0 + row, mask=there, other=0)
        same_lo0 = tl.load(same0 + 2 * row, mask=there, other=0)
        same_hi0 = tl.load(same0 + 2 * row + 1, mask=there, other=0)
        term_lo0, term_hi0 = tl.load(work + TERM), tl.load(work + TERM + 1)
        if TERMS > 1:
            coord1 = tl.load(q_coord1 + row, mask=there, other=0)
            same_lo1 = tl.load(same1 + 2 * row, mask=there, other=0)
            same_hi1 = tl.load(same1 + 2 * row + 1, mask=there, other=0)
            term_lo1, term_hi1 = tl.load(work + TERM + 2), tl.load(work + TERM + 3)
        # Only the keys of the term matter here.
        hull_lo = term_lo1 if OWN else term_lo0
        hull_hi = term_hi1 if OWN else term_hi0
        start = hull_lo
        if DROPOUT:
            sample = tl.load(work + SAMPLE)
            row_local = row - tl.load(q_offsets + sample)
            key_origin = tl.load(k_offsets + sample)
            start = hull_lo - ((hull_lo - key_origin) & 3)

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
            k_coord_tile0 = tl.load(k_coord0 + key, mask=inside, other=0)
            score = add_term(
                score,
                table0 + head.to(tl.int64) * rows0,
                coord0[:, None],
                k_coord_tile0[None, :],
                same_lo0[:, None],
                same_hi0[:, None],
                key[None, :],
                visible_tile,
                (first < term_hi0) & (first + BLOCK_K > term_lo0),
            )
            if TERMS > 1:
                k_coord_tile1 = tl.load(k_coord1 + key, mask=inside, other=0)
                score = add_term(
                    score,
                    table1 + head.to(tl.int64) * rows1,
                    coord1[:, None],
                    k_coord_tile1[None, :],
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
            dscore = prob * (dprob - row_delta[:, None])
            if OWN:
                active = visible_tile & (key[None, :] >= same_lo1[:, None]) & (key[None, :] < same_hi1[:, None])
                q_coord, k_coord = coord1, k_coord_tile1
            else:
                active = visible_tile & (key[None, :] >= same_lo0[:, None]) & (key[None, :] < same_hi0[:, None])
                q_coord, k_coord = coord0, k_coord_tile0
            dscore = tl.where(active, dscore, 0.0).to(k.dtype.element_ty)
            _add_tile(parts, dscore, active, q_coord, k_coord, rows, SPAN, RUN)

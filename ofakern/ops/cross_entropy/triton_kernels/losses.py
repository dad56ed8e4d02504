"""Losses: per token and run of ids the maximum and sums relative to it, then the runs merged in their order.

Five parts f32 [5, splits, tokens]: the largest allowed score; sum of exp(score - largest); sum of (score - largest),
for the smoothing, which so does not cancel; how many ids are allowed; the label's score. -inf where there is none.
"""

import triton
import triton.language as tl

from ofakern.ops.cross_entropy.triton_kernels.tiles import ALL, MASK, RANGE, allowed_tile, meets_tile, score_tile
from ofakern.ops.triton_device import LOG2E

_FAR = tl.constexpr(2**31 - 1)
_NONE = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["tokens", "vocabulary", "always", "blocks_per_split", "range_stride"])
def cross_entropy_scores(
    parts,
    best_parts,
    hidden,
    weight,
    bias,
    labels,
    ranges,
    mask,
    range_stride,
    always,
    tokens,
    vocabulary,
    blocks_per_split,
    ALLOWED: tl.constexpr,
    BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns a block of tokens and a run of blocks of ids; best_parts int32 [splits, tokens]."""
    split = tl.program_id(1)
    first_token = tl.program_id(0) * BLOCK_N
    token = first_token + tl.arange(0, BLOCK_N)
    there = token < tokens
    label = tl.load(labels + token, mask=there, other=-100)
    hidden += first_token.to(tl.int64) * WIDTH
    if ALLOWED == RANGE:
        ranges += first_token * range_stride
    if ALLOWED == MASK:
        mask += first_token.to(tl.int64) * vocabulary
    top = tl.full([BLOCK_N], _NONE, tl.float32)
    label_score = tl.full([BLOCK_N], _NONE, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    below = tl.zeros([BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_N], tl.float32)
    best = tl.full([BLOCK_N], _FAR, tl.int32)
    first_block = split * blocks_per_split
    end = tl.minimum((first_block + blocks_per_split) * BLOCK_V, vocabulary)
    for first in range(first_block * BLOCK_V, end, BLOCK_V):
        ident = first + tl.arange(0, BLOCK_V)
        valid = ident < vocabulary
        own_mask = mask
        if ALLOWED == MASK:
            own_mask += first
        meets = True
        if ALLOWED != ALL:
            meets = meets_tile(
                ranges, range_stride, always, own_mask, vocabulary, there, first, valid, ALLOWED, BLOCK_N, BLOCK_V
            )
        if meets:
            own_bias = bias
            if BIAS:
                own_bias += first
            own_weight = weight + tl.cast(first, tl.int64) * WIDTH
            score = score_tile(hidden, own_weight, own_bias, there, valid, BIAS, WIDTH, BLOCK_N, BLOCK_V, BLOCK_D)
            # Asked a second time: kept over the product it would take a register for each score.
            allowed = allowed_tile(
                ranges, range_stride, always, own_mask, vocabulary, there, ident, valid, ALLOWED, BLOCK_N, BLOCK_V
            )
            score = tl.where(allowed, score, _NONE)
            tile_count = tl.sum(allowed.to(tl.float32), 1)
            tile_top = tl.max(score, 1)
            candidate = tl.min(tl.where(score == tile_top[:, None], ident[None, :], _FAR), 1)
            best = tl.where(tile_top > top, candidate, best)
            grown = tl.maximum(top, tile_top)
            reference = tl.where(grown == _NONE, 0.0, grown)
            shift = tl.where(top == _NONE, 0.0, top - reference)
            tile_label = tl.max(tl.where(ident[None, :] == label[:, None], score, _NONE), 1)
            label_score = tl.maximum(label_score, tile_label)
            relative = score - reference[:, None]
            total = total * tl.exp2(shift * LOG2E) + tl.sum(tl.exp2(relative * LOG2E), 1)
            below += count * shift + tl.sum(tl.where(score == _NONE, 0.0, relative), 1)
            count += tile_count
            top = grown
    step = tl.num_programs(1).to(tl.int64) * tokens
    at = split.to(tl.int64) * tokens + token
    tl.store(parts + at, top, mask=there)
    tl.store(parts + step + at, total, mask=there)
    tl.store(parts + 2 * step + at, below, mask=there)
    tl.store(parts + 3 * step + at, count, mask=there)
    tl.store(parts + 4 * step + at, label_score, mask=there)
    tl.store(best_parts + at, best, mask=there)


@triton.jit(do_not_specialize=["tokens", "splits"])
def cross_entropy_merge(
    loss,
    nll,
    lse,
    best,
    parts,
    best_parts,
    labels,
    tokens,
    splits,
    epsilon,
    BEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss, nll, lse f32 [tokens] and best int64 [tokens] of the parts; 0 and -100 for tokens without a label."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = token < tokens
    label = tl.load(labels + token, mask=there, other=-100)
    row = tokens.to(tl.int64)
    step = splits * row
    top = tl.full([BLOCK], _NONE, tl.float32)
    label_score = tl.full([BLOCK], _NONE, tl.float32)
    largest = tl.full([BLOCK], _FAR, tl.int32)
    for split in range(0, splits):
        at = split * row + token
        part_top = tl.load(parts + at, mask=there, other=_NONE)
        largest = tl.where(part_top > top, tl.load(best_parts + at, mask=there, other=0), largest)
        top = tl.maximum(top, part_top)
        label_score = tl.maximum(label_score, tl.load(parts + 4 * step + at, mask=there, other=_NONE))
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        at = split * row + token
        part_top = tl.load(parts + at, mask=there, other=_NONE)
        scale = tl.where(part_top == _NONE, 0.0, tl.exp2((part_top - top) * LOG2E))
        total += tl.load(parts + step + at, mask=there, other=0.0) * scale
        count += tl.load(parts + 3 * step + at, mask=there, other=0.0)
    summed = top + tl.log(total)
    smooth = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        at = split * row + token
        part_top = tl.load(parts + at, mask=there, other=_NONE)
        part_count = tl.load(parts + 3 * step + at, mask=there, other=0.0)
        part_below = tl.load(parts + 2 * step + at, mask=there, other=0.0)
        smooth += tl.where(part_top == _NONE, 0.0, part_count * (summed - part_top) - part_below)
    labelled = label != -100
    each = tl.where(count > 1.0, epsilon / tl.maximum(count - 1.0, 1.0), 0.0)
    own_nll = summed - label_score
    own_loss = (1.0 - epsilon - each) * own_nll + each * smooth
    tl.store(loss + token, tl.where(labelled, own_loss, 0.0), mask=there)
    tl.store(nll + token, tl.where(labelled, own_nll, 0.0), mask=there)
    tl.store(lse + token, tl.where(labelled, summed, 0.0), mask=there)
    if BEST:
        tl.store(best + token, tl.where(labelled, largest.to(tl.int64), -100), mask=there)

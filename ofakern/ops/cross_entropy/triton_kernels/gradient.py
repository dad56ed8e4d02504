"""The gradient of every score of a chunk of tokens, in the inputs' dtype; scores are computed again."""

import triton
import triton.language as tl

from ofakern.ops.cross_entropy.triton_kernels.tiles import MASK, RANGE, allowed_tile, score_tile
from ofakern.ops.triton_device import LOG2E


@triton.jit(do_not_specialize=["tokens", "vocabulary", "always", "range_stride"])
def cross_entropy_gradient(
    dscore,
    dloss,
    lse,
    counts,
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
    epsilon,
    ALLOWED: tl.constexpr,
    BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dscore [tokens, vocabulary]: dloss ((1 - epsilon - e + e A) p - e - (1 - epsilon - e) [label]), A = counts, e =
    epsilon / (A - 1); 0 where an id is not allowed, where there is no label and where dloss is 0."""
    first_token = tl.program_id(0) * BLOCK_N
    first = tl.program_id(1) * BLOCK_V
    token, ident = first_token + tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_V)
    there, valid = token < tokens, ident < vocabulary
    corner = first_token.to(tl.int64) * vocabulary + first
    own_bias, own_ranges, own_mask = bias, ranges, mask
    if BIAS:
        own_bias += first
    if ALLOWED == RANGE:
        own_ranges += first_token * range_stride
    if ALLOWED == MASK:
        own_mask += corner
    score = score_tile(
        hidden + first_token.to(tl.int64) * WIDTH,
        weight + first.to(tl.int64) * WIDTH,
        own_bias,
        there,
        valid,
        BIAS,
        WIDTH,
        BLOCK_N,
        BLOCK_V,
        BLOCK_D,
    )
    label = tl.load(labels + token, mask=there, other=-100)
    outer = tl.load(dloss + token, mask=there & (label != -100), other=0.0)[:, None]
    count = tl.load(counts + token, mask=there, other=1.0)
    each = tl.where(count > 1.0, epsilon / tl.maximum(count - 1.0, 1.0), 0.0)
    rest = 1.0 - epsilon - each
    total = tl.load(lse + token, mask=there, other=0.0)
    probability = tl.exp2((score - total[:, None]) * LOG2E)
    own = tl.where(ident[None, :] == label[:, None], rest[:, None], 0.0)
    gradient = outer * ((rest + each * count)[:, None] * probability - each[:, None] - own)
    allowed = allowed_tile(
        own_ranges, range_stride, always, own_mask, vocabulary, there, ident, valid, ALLOWED, BLOCK_N, BLOCK_V
    )
    gradient = tl.where(allowed & (outer != 0.0), gradient, 0.0)
    at = tl.arange(0, BLOCK_N)[:, None] * vocabulary + tl.arange(0, BLOCK_V)[None, :]
    tl.store(dscore + corner + at, gradient.to(dscore.dtype.element_ty), mask=there[:, None] & valid[None, :])

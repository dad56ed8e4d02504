"""A tile of tokens of one tensor of images, and their pixels.

A patch is runs of RUN contiguous pixels, HEIGHT of them per frame, FRAMES frames per plane: rows of W, a plane per
channel, or rows of (W, C) in one plane. Pixels of a packed patch are counted in that order.
"""

import triton
import triton.language as tl

# What a row of the table of images holds; kernel_triton.py writes it.
FIELDS = tl.constexpr(11)
# 8-bit pixels are taken less this: integers of 8 bits, exact in every dtype, whose products have no large common part.
CENTRE = tl.constexpr(128)


@triton.jit
def open_tile(
    tile,
    table,
    tiles,
    n_stride,
    t_stride,
    c_stride,
    h_stride,
    rows,
    columns,
    per_image,
    tokens,
    TABLE: tl.constexpr,
    FRAMES: tl.constexpr,
    HEIGHT: tl.constexpr,
    PATCH: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(first, number, there, corner, t_stride, c_stride, h_stride) of BLOCK_N tokens: the first one's place in the
    packed order, each one's place in its image, which of them exist, where their patches start; the tensor's strides.

    Strides and where tensors start come in units of ALIGN elements, so that the compiler knows what divides them.
    PATCH: elements from one patch to the next in a row.
    """
    start, first = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    if TABLE:
        own = table + tiles + FIELDS * tl.load(table + tile)
        start = tl.load(own) * ALIGN
        n_stride = tl.load(own + 1)
        t_stride = tl.load(own + 2)
        c_stride = tl.load(own + 3)
        h_stride = tl.load(own + 4)
        rows = tl.load(own + 5).to(tl.int32)
        columns = tl.load(own + 6).to(tl.int32)
        per_image = tl.load(own + 7).to(tl.int32)
        tokens = tl.load(own + 8).to(tl.int32)
        first = tl.load(own + 9)
        tile = tile - tl.load(own + 10).to(tl.int32)
    n_stride = n_stride.to(tl.int64) * ALIGN
    t_stride = t_stride.to(tl.int64) * ALIGN
    c_stride = c_stride.to(tl.int64) * ALIGN
    h_stride = h_stride.to(tl.int64) * ALIGN
    own_token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    there = own_token < tokens
    image, number = own_token // per_image, own_token % per_image
    frame = number // (rows * columns)
    row, column = number // columns % rows, number % columns
    corner = image * n_stride + frame * (FRAMES * t_stride) + row * (HEIGHT * h_stride) + column * PATCH + start
    return first + tile * BLOCK_N, number, there, corner, t_stride, c_stride, h_stride


@triton.jit
def pixel_tile(
    base,
    there,
    k,
    t_stride,
    c_stride,
    h_stride,
    like,
    FRAMES: tl.constexpr,
    HEIGHT: tl.constexpr,
    RUN: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BYTES: tl.constexpr,
):
    """[BLOCK_N, BLOCK_K] of pixels k of the patches that start at base, in like's dtype; finite where there is none."""
    line = k // RUN
    plane, frame, row = line // (HEIGHT * FRAMES), line // HEIGHT % FRAMES, line % HEIGHT
    at = plane * c_stride + frame * t_stride + row * h_stride + k % RUN
    if DEPTH % BLOCK_K == 0:
        found = tl.load(base[:, None] + at[None, :], mask=there[:, None], other=0)
    else:
        found = tl.load(base[:, None] + at[None, :], mask=there[:, None] & (k < DEPTH)[None, :], other=0)
    if BYTES:
        found = found.to(tl.float32) - CENTRE
    return found.to(like.dtype.element_ty)

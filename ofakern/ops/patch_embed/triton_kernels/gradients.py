"""What is summed over tokens: the gradients of weight and position table. Partition and order come from shapes."""

import triton
import triton.language as tl

from ofakern.ops.patch_embed.triton_kernels.pixels import open_tile, pixel_tile


@triton.jit(
    do_not_specialize=[
        "tiles", "tiles_per_split", "n_stride", "t_stride", "c_stride", "h_stride", "rows", "columns", "per_image",
        "tokens",
    ]
)  # fmt: skip
def patch_embed_weight_sums(
    sums,
    dy,
    pixels,
    table,
    tiles,
    tiles_per_split,
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
    RUN: tl.constexpr,
    PATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BYTES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sums f32 [splits, WIDTH, DEPTH]: dy times the pixels as the product takes them, over a run of tiles."""
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(2)
    total = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    end = tl.minimum((split + 1) * tiles_per_split, tiles)
    for tile in range(split * tiles_per_split, end):
        first, _, there, corner, own_t, own_c, own_h = open_tile(
            tile, table, tiles, n_stride, t_stride, c_stride, h_stride, rows, columns, per_image, tokens,
            TABLE, FRAMES, HEIGHT, PATCH, ALIGN, BLOCK_N,
        )  # fmt: skip
        own = dy + first * WIDTH
        at = tl.arange(0, BLOCK_N)[:, None] * WIDTH + column[None, :]
        a = tl.load(own + at, mask=there[:, None] & (column < WIDTH)[None, :], other=0.0)
        b = pixel_tile(pixels + corner, there, k, own_t, own_c, own_h, dy, FRAMES, HEIGHT, RUN, DEPTH, BLOCK_K, BYTES)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    at = (split.to(tl.int64) * WIDTH + column)[:, None] * DEPTH + k[None, :]
    tl.store(sums + at, total, mask=(column < WIDTH)[:, None] & (k < DEPTH)[None, :])


@triton.jit(do_not_specialize=["splits"])
def patch_embed_weight_gradient(
    dweight,
    sums,
    dbias,
    channels,
    splits,
    CHANNELS: tl.constexpr,
    VOLUME: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dweight [WIDTH, DEPTH] in the weight's own order: scale times the sums, plus offset times the sum of dy."""
    d = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < DEPTH
    if INTERLEAVED:
        channel = k % CHANNELS
        native = channel * VOLUME + k // CHANNELS
    else:
        channel, native = k // VOLUME, k
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        total += tl.load(sums + (tl.cast(split, tl.int64) * WIDTH + d) * DEPTH + k, mask=inside, other=0.0)
    scale = tl.load(channels + 2 * CHANNELS + channel, mask=inside, other=0.0)
    offset = tl.load(channels + 3 * CHANNELS + channel, mask=inside, other=0.0)
    total = total * scale + offset * tl.load(dbias + d)
    tl.store(dweight + d.to(tl.int64) * DEPTH + native, total.to(dweight.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["images", "per_image"])
def patch_embed_position_gradient(
    dposition,
    dy,
    order,
    offsets,
    images,
    per_image,
    SORTED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program owns columns of a place and adds its tokens in their order: those that `order` lists from
    offsets[place] on, or without it token `place` of each image."""
    place = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide = column < WIDTH
    begin, end = place * 0, images
    if SORTED:
        begin, end = tl.load(offsets + place).to(tl.int32), tl.load(offsets + place + 1).to(tl.int32)
    elif place >= per_image:
        end = begin
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(begin, end, ROWS):
        slot = first + tl.arange(0, ROWS)
        valid = slot < end
        if SORTED:
            token = tl.load(order + slot, mask=valid, other=0)
        else:
            token = slot.to(tl.int64) * per_image + place
        at = token[:, None] * WIDTH + column[None, :]
        total += tl.load(dy + at, mask=valid[:, None] & wide[None, :], other=0.0).to(tl.float32)
    at = place.to(tl.int64) * WIDTH + column
    tl.store(dposition + at, tl.sum(total, 0).to(dposition.dtype.element_ty), mask=wide)

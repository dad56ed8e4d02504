"""What Triton kernels of several ops call: tiles of rows, dropout's generator and the normal distribution.

Triton reads these functions' source, so they are untyped and know constants only as `tl.constexpr`.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_of(tile, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """(row [ROWS], column [BLOCK], there and offsets [ROWS, BLOCK]) of a tile of [rows, WIDTH]."""
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (column < WIDTH)[None, :]
    return row, column, there, row.to(tl.int64)[:, None] * WIDTH + column[None, :]


@triton.jit
def load_tile(base, at, there):
    return tl.load(base + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def load_columns(base, column, WIDTH: tl.constexpr):
    """[1, BLOCK] of a parameter."""
    return tl.load(base + column, mask=column < WIDTH, other=0.0)[None, :]


@triton.jit
def store_part(parts, n, total, column, WIDTH: tl.constexpr):
    """The n-th gradient's part of this program: total [ROWS, BLOCK] added over its rows."""
    at = (n * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * WIDTH
    tl.store(parts + at + column, tl.sum(total, 0), mask=column < WIDTH)


@triton.jit
def dropout_key(seed):
    """The two 32-bit halves of seed + offset * 0x9E3779B97F4A7C15, modulo 2^64."""
    offset = tl.load(seed + 1).to(tl.uint64, bitcast=True)
    product = tl.mul(offset, 0x9E3779B97F4A7C15, sanitize_overflow=False)
    key = tl.add(tl.load(seed).to(tl.uint64, bitcast=True), product, sanitize_overflow=False)
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    """Philox4x32-10 as ops/attention/README.md specifies it; one 64-bit product gives both halves."""
    for _ in tl.static_range(10):
        a = tl.mul(c0.to(tl.uint64), 0xD2511F53, sanitize_overflow=False)
        b = tl.mul(c2.to(tl.uint64), 0xCD9E8D57, sanitize_overflow=False)
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ key1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def keep_of_words(w0, w1, w2, w3, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bool [ROWS, COLUMNS] of words [ROWS, COLUMNS // 4]: column c is kept where word c mod 4 is at least limit."""
    even = tl.join((w0 >= limit).to(tl.int8), (w2 >= limit).to(tl.int8))
    odd = tl.join((w1 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [ROWS, COLUMNS]) != 0


@triton.jit
def normal(x):
    """(Phi(x), phi(x)), the standard normal's distribution and density; csrc/core/vec_normal.h has the derivation.

    With e = exp(-x^2 / 2): Phi(-t) = e u R(t u), u = 1 / (t + 5/2): digits where 0.5 (1 + erf) has none left.
    """
    t = tl.abs(x)
    u = 1.0 / (t + 2.5)
    e = tl.exp2(t * t * -0.72134752)
    s = t * u
    r = s * -8.057052746e-2 + 2.829424976e-1
    r = r * s - 3.190371985e-1
    r = r * s + 1.435233665e-1
    r = r * s - 1.529592071e-1
    r = r * s + 5.716922964e-2
    r = r * s + 2.916317096e-1
    r = r * s + 1.696335972e-1
    r = r * s - 1.243393556
    r = r * s + 1.250000019
    below = e * u * r
    return tl.where(x < 0.0, below, 1.0 - below), e * 0.3989422804

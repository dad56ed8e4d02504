"""Cases of decode_attention that the tests of all its kernels share, and the rule that their results keep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from rule import assert_kept
from torch import Tensor

from ofakern.ops.decode_attention import KeyValueCache, decode_attention
from ofakern.ops.decode_attention.reference import decode_attention_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Case:
    """k, v: what the cache holds, by slot; the rest as decode_attention takes it. backend: what `check` calls."""

    q: Tensor
    k: Tensor
    v: Tensor
    row_offsets: Tensor
    counts: Tensor
    slots: Tensor | None
    bias: Tensor | None
    head_scale: Tensor | None
    backend: str = "auto"

    @property
    def first(self) -> Tensor | None:
        return None if self.slots is not None else torch.cumsum(self.counts, 0) - self.counts

    def cache(self, int8: bool = False, backend: str | None = None) -> KeyValueCache:
        if self.slots is None:
            return KeyValueCache.of_source(self.k, self.v, self.counts, int8=int8, backend=backend or self.backend)
        heads, width = self.k.shape[1:]
        cache = KeyValueCache.empty(
            len(self.k), heads, width, self.v.shape[2], self.q.dtype, int8=int8, device=self.k.device
        )
        read = [row[:n] for row, n in zip(self.slots, self.row_counts(), strict=True)]
        named = torch.unique(torch.cat([torch.empty(0, dtype=torch.int32), *read]))
        spoil(cache)
        cache.write(named, self.k[named.long()], self.v[named.long()])
        return cache

    def row_counts(self) -> list[int]:
        return torch.repeat_interleave(self.counts, self.row_offsets.diff()).tolist()

    def options(self) -> dict[str, Any]:
        table = {} if self.slots is None else {"slots": self.slots, "counts": self.counts}
        return table | {"bias": self.bias, "head_scale": self.head_scale}


def spoil(cache: KeyValueCache) -> None:
    """Slots that no table names hold NaN: they must not leak."""
    for x in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
        if x is not None:
            x.fill_(torch.nan if x.dtype.is_floating_point else 99)


def draw(
    dtype: torch.dtype,
    rows: list[int],
    counts: list[int],
    *,
    table: bool = False,
    heads: int = 2,
    width: int = 16,
    value_width: int = 16,
    plain: bool = False,
) -> Case:
    """Seeded by the sizes. table: rows find their keys through slots, which they share at random."""
    g = torch.Generator().manual_seed(sum(rows) * 1000 + sum(counts) + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    total, all_rows, steps = sum(counts), sum(rows), max(counts, default=0)
    stored = total if not table else 2 * steps + 3
    slots = torch.randint(0, max(stored, 1), (all_rows, steps + 2), generator=g, dtype=torch.int32) if table else None
    return Case(
        normal(all_rows, heads, width).to(dtype),
        normal(stored, heads, width).to(dtype),
        normal(stored, heads, value_width).to(dtype),
        torch.tensor([0, *rows], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        torch.tensor(counts, dtype=torch.int32),
        slots,
        None if plain else 2 * normal(heads, total),
        None if plain else 1 + normal(heads) / 4,
    )


def oracle(case: Case, dtype: torch.dtype, k: Tensor | None = None, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    k, v = case.k if k is None else k, case.v if v is None else v
    return decode_attention_reference(
        case.q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        case.row_offsets,
        case.counts,
        first=case.first,
        slots=case.slots,
        bias=cast(case.bias) if dtype == torch.float64 else case.bias,
        head_scale=cast(case.head_scale) if dtype == torch.float64 else case.head_scale,
        scale=0.2,
    )


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def check(case: Case, cache: KeyValueCache | None = None, k: Tensor | None = None, v: Tensor | None = None) -> None:
    """The error of `case`'s backend keeps the rule, on whatever device its numbers are.

    k, v: the numbers that the cache stands for, where they are not the case's.
    """
    cache = case.cache() if cache is None else cache
    options = case.options() | {"scale": 0.2, "return_lse": True, "backend": case.backend}
    out, lse = (x.cpu() for x in decode_attention(case.q, cache, case.row_offsets, **options))
    case = replace(case, **{name: x.cpu() for name, x in vars(case).items() if isinstance(x, Tensor)})
    exact, exact_lse = oracle(case, torch.float64, k, v)
    peer, peer_lse = oracle(case, case.q.dtype if k is None else torch.float32, k, v)
    values = (case.v if v is None else v).double().abs()
    size, _ = oracle(case, torch.float64, k, values)
    # Scores are sums too: their rounding moves every weight by their own size times eps.
    reach = largest(case.q) * largest(case.k if k is None else k) * case.q.shape[2] * 0.2
    dtype = case.q.dtype
    if dtype == torch.float32:
        size = size.abs() * (1 + reach)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_kept("out", out, exact, peer, size.abs(), dtype)
    finite = ~torch.isinf(exact_lse)
    assert torch.equal(torch.isinf(lse), ~finite)
    assert_kept("lse", lse, exact_lse, peer_lse, exact_lse.abs() + reach, torch.float32)


SOURCES: tuple[tuple[list[int], list[int]], ...] = (
    ([1], [1]),
    ([5], [32]),
    ([5, 0, 3], [33, 7, 0]),
    ([2, 17, 1], [64, 600, 31]),
    ([0, 4], [0, 2100]),
    ([8, 6], [129, 1060]),
)
TABLES: tuple[tuple[list[int], list[int]], ...] = (
    ([1], [1]),
    ([3, 0, 2], [5, 9, 17]),
    ([2, 1], [0, 130]),
    ([4, 4], [128, 300]),
)
# K, Kv: pairs and panels are padded.
WIDTHS = ((16, 16), (64, 64), (24, 40), (1, 3), (80, 128))

"""Cases of decode_attention and its peers: one step's attention of OFA-base's six decoder layers.

Every layer has its own keys and values, as in a search, so that they come from memory or the last cache, not from a
nearer one. The bias of a step is made outside the timed region for everybody.

Encoder keys ("cross"), of B samples and all their beams:
folded          keys stored once, beams folded into the query rows of torch's SDPA: nothing is copied or read twice.
expanded_bmm    keys and values expanded to every beam, as transformers keeps them; matmul, softmax, matmul.
expanded_sdpa   the same with SDPA.

Own past ("self"):
index_select    the cache is reordered by index_select, as transformers does at every step of a beam search, then SDPA.
in_order        SDPA on a cache that happens to be in order already: what no reordering costs.
cpu_int8        ours with int8 caches: other numbers (rounded), half the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Phase, Unavailable, Work
from benchmarks.moved import moved
from ofakern.ops.decode_attention import KeyValueCache, decode_attention
from ofakern.ops.decode_attention.reference import decode_attention_reference

OP = "decode_attention"
OURS = "cpu"
DEVICES = ("cpu", "cuda")
PHASES = ("fwd",)
ABOUT = {
    "folded": "torch SDPA with a sample's beams as its query rows, keys stored once",
    "expanded_bmm": "keys and values expanded to every beam; matmul, softmax, matmul",
    "expanded_sdpa": "keys and values expanded to every beam; torch SDPA",
    "index_select": "the cache reordered by index_select at every step, then torch SDPA",
    "in_order": "torch SDPA on a cache that needs no reordering",
    "cpu_int8": "ours, keys and values rounded to int8",
}
LAYERS = 6
WIDTH = 64


@dataclass(frozen=True)
class Spec:
    """samples B with `beams` rows each; keys S of every sample or (own) steps T of every row."""

    name: str
    description: str
    samples: int
    beams: int
    keys: int
    own: bool = False
    quick: bool = False
    default: bool = True
    heads: int = 12

    @property
    def rows(self) -> int:
        return self.samples * self.beams


CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("cross_b4_beam5_s1024", "encoder keys: B4 beam 5 H12 S1024 K64", 4, 5, 1024, quick=True),
        Spec("cross_b16_beam5_s1024", "encoder keys: B16 beam 5 H12 S1024 K64", 16, 5, 1024, default=False),
        Spec("cross_b32_beam5_s1024", "encoder keys: B32 beam 5 H16 S1024 K64", 32, 5, 1024, default=False, heads=16),
        Spec("self_b4_beam5_t16", "own past: B4 beam 5 H12 T16 K64, reordered", 4, 5, 16, own=True, quick=True),
        Spec(
            "self_b32_beam5_t16",
            "own past: B32 beam 5 H16 T16 K64, reordered",
            32,
            5,
            16,
            True,
            default=False,
            heads=16,
        ),
        Spec("self_b4_beam5_t128", "own past: B4 beam 5 H12 T128 K64, reordered", 4, 5, 128, own=True),
        Spec("self_b4_t1024", "own past: 4 rows without beams, H12 T1024 K64 (an image's codes)", 4, 1, 1024, own=True),
    )
}


@dataclass
class Problem:
    """k, v by layer: `[samples (or rows), S, H, K]`; own: row r's step t was made by row parents[r,t]."""

    spec: Spec
    dtype: torch.dtype
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    bias: Tensor
    parents: Tensor

    @property
    def row_offsets(self) -> Tensor:
        return torch.arange(0, self.spec.rows + 1, self.spec.beams, dtype=torch.int32)

    @property
    def table(self) -> Tensor:
        """Slots of a cache to which every step wrote all rows, one after the other."""
        steps = torch.arange(self.spec.keys, dtype=torch.int32) * self.spec.rows
        return steps + self.parents

    @property
    def counts(self) -> Tensor:
        return torch.full((self.spec.samples,), self.spec.keys, dtype=torch.int32)

    def moved(self, x: Tensor) -> Tensor:
        """`[R, T, H, K]` in which every row has its own past."""
        return x[self.parents.long(), torch.arange(self.spec.keys)]


def make(spec: Spec, dtype: str) -> Problem:
    """Inputs drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DTYPES[dtype])

    held = spec.rows if spec.own else spec.samples
    k, v = ([normal(held, spec.keys, spec.heads, WIDTH) for _ in range(LAYERS)] for _ in range(2))
    bias = torch.randn((spec.heads, spec.samples * spec.keys), generator=generator)
    beam = torch.randint(0, spec.beams, (spec.rows, spec.keys), generator=generator)
    parents = torch.arange(spec.rows)[:, None] // spec.beams * spec.beams + beam
    q = [normal(spec.rows, spec.heads, WIDTH) for _ in range(LAYERS)]
    return Problem(spec, DTYPES[dtype], q, k, v, bias, parents.to(torch.int32))


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """2 R H S (K + Kv) operations a layer; every key and value that the step needs read once, in its own dtype.

    Beams of a search share most of their past; counted is what they share here (a random ancestor for every step).
    """
    flops = 4.0 * spec.rows * spec.heads * spec.keys * WIDTH * LAYERS
    read: float = spec.samples * spec.keys
    if spec.own:  # of `beams` slots of a step, those that some row names
        read = spec.samples * spec.keys * spec.beams * (1 - (1 - 1 / spec.beams) ** spec.beams)
    total = 2 * DTYPES[dtype].itemsize * read * spec.heads * WIDTH * LAYERS
    return Work(flops, total, cold=total >= 2**26)


def verify(spec: Spec, dtype: str, harness: Any, backend: str = "auto") -> None:
    """Raises AssertionError when one layer's result is wrong."""
    problem = make(spec, dtype)
    there = moved(problem, "cuda") if backend == "cuda" else problem
    got = _ours(there, OURS, int8=False, layers=1, backend=backend).forward()
    assert isinstance(got, Tensor)
    got = got.cpu()
    k, v = problem.k[0].flatten(0, 1), problem.v[0].flatten(0, 1)
    first = torch.arange(spec.samples) * spec.keys
    table = problem.parents * spec.keys + torch.arange(spec.keys)
    where = {"slots": table} if spec.own else {"first": first}

    def oracle(dtype: torch.dtype, v: Tensor) -> Tensor:
        bias = problem.bias.to(dtype) if dtype == torch.float64 else problem.bias
        parts = (problem.q[0].to(dtype), k.to(dtype), v.to(dtype), problem.row_offsets, problem.counts)
        return decode_attention_reference(*parts, bias=bias, scale=WIDTH**-0.5, **where)[0]

    exact, size = oracle(torch.float64, v), oracle(torch.float64, v.abs())
    harness.assert_kept("out", got, exact, oracle(problem.dtype, v), size, problem.dtype)


def _ours(problem: Problem, name: str, int8: bool, layers: int = LAYERS, backend: str = "auto") -> Contender:
    spec, rows, bias = problem.spec, problem.row_offsets, problem.bias
    caches = [_cache(problem, layer, int8, backend) for layer in range(layers)]
    options: dict[str, Any] = {"slots": problem.table, "counts": problem.counts} if spec.own else {}

    def forward() -> Tensor:
        for q, cache in zip(problem.q, caches, strict=False):
            out = decode_attention(q, cache, rows, bias=bias, backend=backend, **options)
        return out  # type: ignore[return-value]

    if layers == LAYERS:  # all contenders show the first layer
        caches = [*caches[1:], caches[0]]
        problem = Problem(**{**vars(problem), "q": [*problem.q[1:], problem.q[0]]})
    return Contender(name, forward, exact=not int8)


def _cache(problem: Problem, layer: int, int8: bool, backend: str) -> KeyValueCache:
    k, v = problem.k[layer], problem.v[layer]
    if not problem.spec.own:
        return KeyValueCache.of_source(k.flatten(0, 1), v.flatten(0, 1), problem.counts, int8=int8, backend=backend)
    slots = problem.spec.rows * problem.spec.keys
    cache = KeyValueCache.empty(slots, problem.spec.heads, WIDTH, dtype=problem.dtype, int8=int8, device=k.device)
    cache.write(torch.arange(slots), k.transpose(0, 1).flatten(0, 1), v.transpose(0, 1).flatten(0, 1))
    return cache


def ours(problem: Problem, backend: str = "auto") -> Contender:
    return _ours(problem, OURS, False, backend=backend)


def ours_int8(problem: Problem) -> Contender:
    on_gpu = problem.q[0].is_cuda
    return _ours(problem, "cpu_int8", True, backend="cuda" if on_gpu else "auto")


def _mask(problem: Problem, samples_repeat: int) -> Tensor:
    """`[B * repeat, H, 1, S]` in the dtype of q."""
    spec = problem.spec
    mask = (
        problem.bias.view(spec.heads, spec.samples, 1, spec.keys).transpose(0, 1).repeat_interleave(samples_repeat, 0)
    )
    return mask.to(problem.dtype).contiguous()


def _in_turn(problem: Problem, name: str, call: Callable[[int], Tensor]) -> Contender:
    """call(layer) -> `[R, H, K]`; the first layer comes last, and is shown."""

    def forward() -> Tensor:
        for layer in (*range(1, LAYERS), 0):
            out = call(layer)
        return out

    return Contender(name, forward)


def _heads_first(x: list[Tensor], repeat: int = 1) -> list[Tensor]:
    return [part.transpose(1, 2).repeat_interleave(repeat, 0).contiguous() for part in x]


def _only(problem: Problem, own: bool) -> None:
    if problem.spec.own != own:
        raise Unavailable("it is a peer of the other kind of cache")


def folded(problem: Problem) -> Contender:
    _only(problem, own=False)
    spec, k, v = problem.spec, _heads_first(problem.k), _heads_first(problem.v)
    mask = _mask(problem, 1).expand(-1, -1, spec.beams, -1)

    def call(layer: int) -> Tensor:
        q = problem.q[layer].view(spec.samples, spec.beams, spec.heads, WIDTH).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k[layer], v[layer], attn_mask=mask)
        return out.transpose(1, 2).reshape(spec.rows, spec.heads, WIDTH)

    return _in_turn(problem, "folded", call)


def expanded_bmm(problem: Problem) -> Contender:
    _only(problem, own=False)
    beams = problem.spec.beams
    k, v, mask = _heads_first(problem.k, beams), _heads_first(problem.v, beams), _mask(problem, beams)

    def call(layer: int) -> Tensor:
        scores = torch.matmul(problem.q[layer][:, :, None], k[layer].transpose(2, 3)) * WIDTH**-0.5 + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(problem.dtype)
        return torch.matmul(weights, v[layer])[:, :, 0]

    return _in_turn(problem, "expanded_bmm", call)


def expanded_sdpa(problem: Problem) -> Contender:
    _only(problem, own=False)
    beams = problem.spec.beams
    k, v, mask = _heads_first(problem.k, beams), _heads_first(problem.v, beams), _mask(problem, beams)

    def call(layer: int) -> Tensor:
        return F.scaled_dot_product_attention(problem.q[layer][:, :, None], k[layer], v[layer], attn_mask=mask)[:, :, 0]

    return _in_turn(problem, "expanded_sdpa", call)


def index_select(problem: Problem) -> Contender:
    """The reordering of this step is the identity on a cache that is in order: the same work as any other."""
    _only(problem, own=True)
    if problem.spec.beams == 1:
        raise Unavailable("without beams there is nothing to reorder")
    return _own_sdpa(problem, "index_select", torch.arange(problem.spec.rows))


def in_order(problem: Problem) -> Contender:
    _only(problem, own=True)
    return _own_sdpa(problem, "in_order", None)


def _own_sdpa(problem: Problem, name: str, order: Tensor | None) -> Contender:
    k, v = (_heads_first([problem.moved(part) for part in parts]) for parts in (problem.k, problem.v))
    mask = _mask(problem, problem.spec.beams)

    def call(layer: int) -> Tensor:
        if order is not None:
            k[layer], v[layer] = k[layer].index_select(0, order), v[layer].index_select(0, order)
        return F.scaled_dot_product_attention(problem.q[layer][:, :, None], k[layer], v[layer], attn_mask=mask)[:, :, 0]

    return _in_turn(problem, name, call)


CONTENDERS: dict[str, Callable[[Any], Contender]] = {
    OURS: ours,
    "folded": folded,
    "expanded_bmm": expanded_bmm,
    "expanded_sdpa": expanded_sdpa,
    "index_select": index_select,
    "in_order": in_order,
    "cpu_int8": ours_int8,
}

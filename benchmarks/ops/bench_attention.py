"""Cases of attention, its peers, and the work that counts; `attention_peers` holds the peers' formulas.

Cases named `ofa_*` are OFA's encoder: an image of `grid` x `grid` patches before a run of text, factored position terms
of width 64, one relative table (image block, text block) and a head scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Phase, Work
from benchmarks.ops import attention_check, attention_peers
from ofakern.ops.attention import AttentionLayout, RelativeTerm, attention, intervals

OP = "attention"
OURS = "cpu"


@dataclass(frozen=True)
class Spec:
    """A case. lengths: tokens per sample (queries; keys too unless key_lengths says otherwise).

    grid: side of the image in patches, 0 without one; the rest of a sample is text. pos_width: P, 0 without the
    factored term. table: one relative term, image and text blocks; head_scale comes with either. shared: all samples
    have the same positions, and the layout says so.
    """

    name: str
    description: str
    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...] | None = None
    heads: int = 12
    width: int = 64
    pos_width: int = 0
    grid: int = 0
    table: bool = False
    causal: bool = False
    shared: bool = False
    quick: bool = False
    default: bool = True

    @property
    def keys(self) -> tuple[int, ...]:
        return self.lengths if self.key_lengths is None else self.key_lengths

    @property
    def position_sets(self) -> int:
        """How many samples have positions of their own."""
        return 1 if self.shared else len(self.lengths)

    @property
    def image(self) -> int:
        return self.grid**2

    @property
    def pairs(self) -> int:
        """Scores that have to be computed, per head."""
        if self.causal:
            return sum(n * (n + 1) // 2 for n in self.lengths)
        return sum(n * m for n, m in zip(self.lengths, self.keys, strict=True))


def _ofa(name: str, description: str, batch: int, grid: int, text: int, **changes: Any) -> Spec:
    return Spec(name, description, (grid**2 + text,) * batch, pos_width=64, grid=grid, table=True, **changes)


_RAGGED = (32, 96, 160, 288, 480, 608, 800, 1024)
CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _ofa("ofa_base_enc_1024", "OFA-base encoder, B2, 900 image and 124 text tokens", 2, 30, 124, quick=True),
        _ofa("ofa_base_enc_1024_b8", "the same, B8: samples that share their positions", 8, 30, 124, shared=True),
        _ofa("ofa_base_enc_1024_b32", "the same, B32: a GPU's size", 32, 30, 124, shared=True, default=False),
        Spec("plain_1024", "no bias, no mask, B2 T1024", (1024,) * 2),
        Spec("plain_1024_b32", "the same, B32: a GPU's size", (1024,) * 32, default=False),
        Spec("causal_1024", "no bias, causal, B2 T1024", (1024,) * 2, causal=True),
        Spec("ragged", "no bias, 8 samples of 32 to 1024 tokens", _RAGGED),
        _ofa("small_16", "text only, B1 T16, all terms", 1, 0, 16, quick=True),
        _ofa("small_64", "text only, B4 T64, all terms", 4, 0, 64),
        Spec("decode", "one query on 1024 keys, B8, factored term", (1,) * 8, (1024,) * 8, pos_width=64),
        _ofa("long_16384", "B1, 126 x 126 image and 508 text tokens", 1, 126, 508, default=False),
    )
}
HARNESS = "harness"
DEVICES = ("cpu", "cuda")
SLOW_CONTENDERS = frozenset({"flex"})
MEMORY_PEER = "sdpa_mask"
ABOUT = {
    "sdpa_plain": "SDPA on q, k, v alone: no bias, so not the same function",
    "sdpa_mask": "SDPA with the dense bias built from q_pos, k_pos and the table in the timed region, gradients to all",
    "sdpa_concat": "SDPA on concatenated (q, q_pos) and (k, k_pos), v padded, the table as a mask",
    "flex": "compiled FlexAttention, forward only on CPU",
    "ofasys": "OFASys' formula",
    "flash": "flash-attn 2, deterministic, on a GPU only",
}


@dataclass
class Problem:
    """A case's random inputs, packed; `rows` is the layout's table index of every pair of one sample, for peers."""

    spec: Spec
    dtype: torch.dtype
    layout: AttentionLayout
    q: Tensor
    k: Tensor
    v: Tensor
    q_pos: Tensor | None
    k_pos: Tensor | None
    tables: tuple[Tensor, ...]
    head_scale: Tensor | None
    dout: Tensor
    scale: float

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        optional = (self.q_pos, self.k_pos, *self.tables, self.head_scale)
        return (self.q, self.k, self.v, *(x for x in optional if x is not None))

    def run(self, return_lse: bool = False, backend: str = OURS) -> Any:
        """Our kernel on the case."""
        return attention(
            self.q,
            self.k,
            self.v,
            self.layout,
            self.q_pos,
            self.k_pos,
            self.tables,
            self.head_scale,
            self.scale,
            return_lse=return_lse,  # type: ignore[call-overload]
            backend=backend,
        )


def make(spec: Spec, dtype: str) -> Problem:
    """Inputs drawn from a fixed seed, all asking for a gradient; scale is (K + P)**-0.5, as in OFA."""
    generator = torch.Generator().manual_seed(1)
    queries, keys = sum(spec.lengths), sum(spec.keys)

    def normal(*shape: int, like: torch.dtype = DTYPES[dtype]) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    def leaf(*shape: int, like: torch.dtype = DTYPES[dtype]) -> Tensor:
        return normal(*shape, like=like).requires_grad_()

    terms = _terms(spec)
    visible = intervals.causal(spec.lengths) if spec.causal else intervals.cross(spec.lengths, spec.keys)
    heads, width, pos = spec.heads, spec.width, spec.pos_width
    sets = [0] * len(spec.lengths) if spec.shared else None
    q_rows, k_rows = sum(spec.lengths[: spec.position_sets]), sum(spec.keys[: spec.position_sets])
    return Problem(
        spec,
        DTYPES[dtype],
        AttentionLayout.build(visible, spec.lengths, spec.keys, terms, sets, sets),
        leaf(queries, heads, width),
        leaf(keys, heads, width),
        leaf(keys, heads, width),
        leaf(q_rows, heads, pos) if pos else None,
        leaf(k_rows, heads, pos) if pos else None,
        tuple(leaf(heads, term.rows, like=torch.float32) for term in terms),
        leaf(heads, like=torch.float32) if pos or spec.table else None,
        normal(queries, heads, width),
        (width + pos) ** -0.5,
    )


def _terms(spec: Spec) -> list[RelativeTerm]:
    """OFA's coordinates: y * (2G - 1) + x of a patch, the position of a text token; each block has its own rows."""
    if not spec.table:
        return []
    batch, text = len(spec.lengths), spec.lengths[0] - spec.image
    extent = (spec.grid - 1) * 2 * spec.grid if spec.grid else 0  # the largest coordinate of a patch
    image_rows = 2 * extent + 1 if spec.grid else 0
    patch = torch.arange(spec.image)
    if spec.grid:
        patch = patch // spec.grid * (2 * spec.grid - 1) + patch % spec.grid
    position = torch.arange(text)
    q_coord = torch.cat([patch + extent, position + image_rows + text - 1])
    k_coord = torch.cat([patch, position])
    same = intervals.full([length for _ in range(batch) for length in (spec.image, text)])
    rows = image_rows + 2 * text - 1
    return [RelativeTerm(q_coord.int().repeat(batch), k_coord.int().repeat(batch), same, rows)]


def reduced(spec: Spec) -> Spec:
    """The same case, small enough for the reference's dense matrices and for warming up."""
    grid, text = min(spec.grid, 9), min(spec.lengths[0] - spec.image, 45)
    if spec.table:
        lengths = (grid**2 + text,) * min(len(spec.lengths), 2)
    else:
        lengths = tuple(min(n, 130) for n in spec.lengths[:3])
    keys = None if spec.key_lengths is None else tuple(min(n, 130) for n in spec.key_lengths[: len(lengths)])
    return replace(spec, lengths=lengths, key_lengths=keys, heads=2, grid=grid)


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """The work of a case, the same for every contender.

    Per head and visible pair, K = V = `width`, P = `pos_width`, 2 operations per multiply-add:
    forward: q.k 2K, q_pos.k_pos 2P, probability times v 2V                                    -> 2(K+P) + 2V
    backward: the scores again 2(K+P), dP = dout.v 2V, dv 2V, dq and dk 4K, dq_pos, dk_pos 4P  -> 6(K+P) + 4V
    With K = V = P = 64 that is 384 and 1024, without the factored term 256 and 640. Where samples share their
    positions, P counts once for all of them. The bias, exponentials and table
    sums are not counted. Bytes: each input read once, each output written once, in each pass.
    """
    head_pairs = spec.heads * spec.pairs
    query_key, value = spec.width + spec.pos_width * spec.position_sets / len(spec.lengths), spec.width
    flops = head_pairs * (2 * query_key + 2 * value)
    item = DTYPES[dtype].itemsize
    queries, keys = spec.heads * sum(spec.lengths), spec.heads * sum(spec.keys)
    inputs = item * (queries * query_key + keys * (query_key + value)) + 4 * sum(
        spec.heads * term.rows for term in _terms(spec)
    )
    outputs = queries * (item * value + 4)
    moved = inputs + outputs
    if phase == "fwd+bwd":
        flops += head_pairs * (6 * query_key + 4 * value)
        moved += inputs + outputs + item * queries * value + inputs  # in, out, dout; the gradients
    return Work(float(flops), float(moved))


def verify(spec: Spec, dtype: str, harness: Any, backend: str = OURS) -> None:
    """Raises AssertionError when our kernel is wrong on the case: all gradients reduced, then the timed size itself."""
    attention_check.reduced_size(make(reduced(spec), dtype), harness, backend)
    attention_check.timed_size(make(spec, dtype), harness, backend)


def ours(problem: Problem, backend: str = OURS) -> Contender:
    forward = partial(problem.run, backend=backend)
    return Contender(backend, forward, problem.leaves, problem.dout, packed=lambda out: out)


CONTENDERS: dict[str, Callable[..., Contender]] = {OURS: ours} | attention_peers.PEERS

"""Cases of the other two ops of the room layer_norm, head_scale_layer_norm and embed_layer_norm, beside torch's
separate ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Phase, Work
from benchmarks.moved import runner
from ofakern.ops.layer_norm import embed_layer_norm, head_scale_layer_norm

OP = "layer_norm"
OURS = "cpu"
HARNESS = "layer_norm_cases"
DEVICES = ("cpu", "cuda")
ABOUT = {"torch": "scale or embeddings, then layer_norm: separate ops of torch, weights in the activations' dtype"}


@dataclass(frozen=True)
class Spec:
    """A case of one of the two ops. entries: V of the token table, 0 for head_scale_layer_norm."""

    name: str
    description: str
    rows: int
    heads: int = 12
    width: int = 768
    entries: int = 0
    quick: bool = False
    default: bool = True


CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("head_scale_22k", "head_scale_layer_norm of 21,846 tokens, H12 K64 (64 MB in float32)", 21846, quick=True),
        Spec(
            "embed_8192", "embed_layer_norm of 8,192 tokens, D768, OFA's 59,457 entries, one type", 8192, entries=59457
        ),
    )
}


@dataclass
class Problem:
    """leaves: what is differentiated, ours first; tokens: of the embedding."""

    spec: Spec
    x: Tensor
    scale: Tensor
    tokens: Tensor
    types: Tensor
    weight: Tensor
    bias: Tensor
    dout: Tensor


def make(spec: Spec, dtype: str) -> Problem:
    """Inputs from a fixed seed, all asking for a gradient; tokens are drawn evenly."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    kind = DTYPES[dtype]
    x = normal(spec.entries, spec.width, like=kind) if spec.entries else normal(spec.rows, spec.width, like=kind)
    x = x if spec.entries else x.view(spec.rows, spec.heads, -1)
    return Problem(
        spec,
        x.requires_grad_(),
        normal(spec.heads).requires_grad_(),
        torch.randint(0, max(spec.entries, 1), (spec.rows,), generator=generator),
        normal(1, spec.width, like=kind).requires_grad_(),
        normal(spec.width).requires_grad_(),
        normal(spec.width).requires_grad_(),
        normal(spec.rows, spec.width, like=kind),
    )


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """Forward reads one array of `[rows, width]` and writes one, 7 operations an element; backward reads two and writes
    one, 11 operations, and the embedding's also writes the whole gradient of its table."""
    array = spec.rows * spec.width
    elements, operations = 2 * array, 7 * array
    if phase == "fwd+bwd":
        elements += 3 * array if not spec.entries else 2 * array + spec.entries * spec.width
        operations += 11 * array
    return Work(0.0, float(elements * DTYPES[dtype].itemsize), {"vector": float(operations)})


def verify(spec: Spec, dtype: str, harness: Any, backend: str = OURS) -> None:
    """Raises AssertionError when our kernel breaks the rule at the case's width."""
    op = "embed" if spec.entries else "head_scale"
    case = harness.make_case(op, 1, 70, spec.width, heads=spec.heads, dtype=DTYPES[dtype])
    harness.check(case, runner(backend, harness.run_on(backend)))


def ours(problem: Problem, backend: str = OURS) -> Contender:
    p = problem

    def embed() -> Tensor:
        return embed_layer_norm(p.tokens, p.x, p.weight, p.bias, p.types, backend=backend)

    def heads() -> Tensor:
        return head_scale_layer_norm(p.x, p.scale, p.weight, p.bias, backend=backend)

    if p.spec.entries:
        return Contender(backend, embed, (p.x, p.types, p.weight, p.bias), p.dout)
    return Contender(backend, heads, (p.x, p.scale, p.weight, p.bias), p.dout)


def plain(problem: Problem) -> Contender:
    p = problem
    weight, bias, scale = (t.detach().to(p.x.dtype).requires_grad_() for t in (p.weight, p.bias, p.scale))

    def norm(z: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(z, (p.spec.width,), weight, bias)

    if p.spec.entries:
        leaves = (p.x, p.types, weight, bias)
        return Contender("torch", lambda: norm(torch.nn.functional.embedding(p.tokens, p.x) + p.types), leaves, p.dout)
    leaves = (p.x, scale, weight, bias)
    return Contender("torch", lambda: norm((p.x * scale[:, None]).flatten(1)), leaves, p.dout)


CONTENDERS: dict[str, Callable[..., Contender]] = {OURS: ours, "torch": plain}

"""The routed feed-forward layer: cases, peers and the work that counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Phase, Work
from ofakern.ops.routed_ffn import routed_ffn

OP = "routed_ffn"
MEMORY_PEER = "loop"


@dataclass(frozen=True)
class Spec:
    """tokens N, each of one of `experts` modalities at random; D to F to D, GELU and LayerNorm between."""

    name: str
    description: str
    tokens: int
    experts: int = 5
    width: int = 768
    hidden: int = 3072
    quick: bool = False
    default: bool = True


CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("n4096_m5", "4096 tokens, 5 modalities, D768, F3072", 4096),
        Spec("n256_m5", "256 tokens, 5 modalities, D768, F3072", 256),
        Spec("n64_m5_d64", "64 tokens, 5 modalities, D64, F256", 64, 5, 64, 256, quick=True),
    )
}
ABOUT = {
    "cpu": "the compiled kernel, which `auto` takes for bf16 and f16",
    "loop": "per expert: its tokens gathered, F.linear, GELU, LayerNorm, F.linear, written back",
    "dense": "one feed-forward layer for all tokens: no routing, so not the same function",
}


@dataclass(frozen=True)
class Problem:
    """A case's random inputs; the tokens' modalities are mixed, as in a packed batch."""

    x: Tensor
    expert: Tensor
    fc1: list[Tensor]
    fc1_bias: list[Tensor]
    fc2: list[Tensor]
    fc2_bias: list[Tensor]
    ln: tuple[Tensor, Tensor]
    dy: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.x, *self.fc1, *self.fc1_bias, *self.fc2, *self.fc2_bias, *self.ln)

    def layer(self, x: Tensor, e: int) -> Tensor:
        """Expert e in plain torch."""
        hidden = F.gelu(F.linear(x, self.fc1[e], self.fc1_bias[e]))
        return F.linear(F.layer_norm(hidden, hidden.shape[-1:], *self.ln), self.fc2[e], self.fc2_bias[e])


def make(spec: Spec, dtype: str) -> Problem:
    """Inputs drawn from a fixed seed, all floating ones asking for a gradient."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(DTYPES[dtype]).requires_grad_()

    d, f, experts = spec.width, spec.hidden, range(spec.experts)
    return Problem(
        leaf(spec.tokens, d),
        torch.randint(spec.experts, (spec.tokens,), generator=generator, dtype=torch.int32),
        [leaf(f, d, scale=d**-0.5) for _ in experts],
        [leaf(f) for _ in experts],
        [leaf(d, f, scale=f**-0.5) for _ in experts],
        [leaf(d) for _ in experts],
        (leaf(f), leaf(f)),
        torch.randn(spec.tokens, d, generator=generator).to(DTYPES[dtype]),
    )


def reduced(spec: Spec) -> Spec:
    """The same case, small: warms up before memory is measured."""
    return replace(spec, tokens=min(spec.tokens, 40), width=64, hidden=128)


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """Two products forward, four backward; weights and tokens read once in each pass, gradients written once."""
    pair = spec.width * spec.hidden
    operands = DTYPES[dtype].itemsize * (2 * spec.experts * pair + spec.tokens * (2 * spec.width + 2 * spec.hidden))
    passes = 1 if phase == "fwd" else 3
    return Work(4.0 * spec.tokens * pair * passes, float(operands * passes), {"erf": float(spec.tokens * spec.hidden)})


def verify(spec: Spec, dtype: str, harness: Any) -> None:
    """Raises AssertionError unless output and gradients of the (reduced) case keep the op tests' rule."""
    small = make(reduced(spec), dtype)
    kind = DTYPES[dtype]
    exact, peer = _results(small, torch.float64, "reference"), _results(small, kind, "reference")
    for n, (have, right, theirs) in enumerate(zip(_results(small, kind, "cpu"), exact, peer, strict=True)):
        harness.assert_kept(f"result {n}", have, right, theirs, right.abs() + right.abs().mean(), kind)


def _results(problem: Problem, dtype: torch.dtype, backend: str) -> list[Tensor]:
    def to(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(to(x) for x in value)
        return value.detach().to(dtype).requires_grad_() if value.is_floating_point() else value

    cast = Problem(*(to(value) for value in vars(problem).values()))
    y = _ours(cast, backend)
    return [y.detach(), *torch.autograd.grad(y, cast.leaves, cast.dy.detach())]


def _ours(p: Problem, backend: str) -> Tensor:
    return routed_ffn(p.x, p.expert, p.fc1, p.fc1_bias, p.fc2, p.fc2_bias, *p.ln, backend=backend)


def ours(problem: Problem) -> Contender:
    return Contender("auto", lambda: _ours(problem, "auto"), problem.leaves, problem.dy)


def kernel(problem: Problem) -> Contender:
    return Contender("cpu", lambda: _ours(problem, "cpu"), problem.leaves, problem.dy)


def loop(problem: Problem) -> Contender:
    rows = [(problem.expert == e).nonzero()[:, 0] for e in range(len(problem.fc1))]

    def forward() -> Tensor:
        y = torch.empty_like(problem.dy)
        for e, index in enumerate(rows):
            y = y.index_copy(0, index, problem.layer(problem.x.index_select(0, index), e))
        return y

    return Contender("loop", forward, problem.leaves, problem.dy)


def dense(problem: Problem) -> Contender:
    leaves = (problem.x, problem.fc1[0], problem.fc1_bias[0], problem.fc2[0], problem.fc2_bias[0], *problem.ln)
    return Contender("dense", lambda: problem.layer(problem.x, 0), leaves, problem.dy, exact=False)


CONTENDERS: dict[str, Callable[[Any], Contender]] = {"auto": ours, "cpu": kernel, "loop": loop, "dense": dense}

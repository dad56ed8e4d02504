"""Cross entropy of the tied output projection: cases, peers and the work that counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Phase, Work
from ofakern.ops.cross_entropy import cross_entropy

OP = "cross_entropy"
DEVICES = ("cpu", "cuda")
EPSILON = 0.1


@dataclass(frozen=True)
class Spec:
    """tokens N, all with a label; width D; vocabulary V; label smoothing 0.1; the loss is a sum."""

    name: str
    description: str
    tokens: int
    width: int = 768
    vocabulary: int = 59457
    quick: bool = False
    default: bool = True


CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("n4096_v59457", "4096 tokens, D768, V59457", 4096),
        Spec("n256_v59457", "256 tokens, D768, V59457", 256),
        Spec("n64_v8192", "64 tokens, D256, V8192", 64, 256, 8192, quick=True),
    )
}
ABOUT = {
    "torch": "F.linear and F.cross_entropy in the case's dtype",
    "torch_f32logits": "the same with float32 logits, as OFA and OFASys train",
}


@dataclass(frozen=True)
class Problem:
    """A case's random inputs; the scale of weight is that of trained embeddings, so that logits are a few units."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor

    @property
    def smoothing(self) -> float:
        """torch's smoothing that gives OFA's function: it spreads over all V ids, the label's own included."""
        vocabulary = self.weight.shape[0]
        return EPSILON * vocabulary / (vocabulary - 1)


def make(spec: Spec, dtype: str) -> Problem:
    """Inputs drawn from a fixed seed, hidden and weight asking for a gradient."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(spec.tokens, spec.width, generator=generator)
    weight = torch.randn(spec.vocabulary, spec.width, generator=generator) * spec.width**-0.5
    labels = torch.randint(spec.vocabulary, (spec.tokens,), generator=generator)
    kind = DTYPES[dtype]
    return Problem(hidden.to(kind).requires_grad_(), weight.to(kind).requires_grad_(), labels)


def reduced(spec: Spec) -> Spec:
    """The same case, small: warms up before memory is measured."""
    return replace(spec, tokens=min(spec.tokens, 64), vocabulary=min(spec.vocabulary, 2048))


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """One product forward, two backward (a score that is computed again is not counted), one exponential a score.

    Bytes: hidden and weight read once in each pass, their gradients written once; no logits.
    """
    pairs = spec.tokens * spec.vocabulary
    operands = DTYPES[dtype].itemsize * spec.width * (spec.tokens + spec.vocabulary)
    passes = 1 if phase == "fwd" else 3
    return Work(2.0 * pairs * spec.width * passes, float(operands * passes), {"exp": float(pairs)})


def verify(spec: Spec, dtype: str, harness: Any, backend: str = "cpu") -> None:
    """Raises AssertionError unless losses and gradients of the (reduced) case keep the op tests' rule."""
    small = make(reduced(spec), dtype)
    kind = DTYPES[dtype]

    def run(chosen: str, to: torch.dtype) -> SimpleNamespace:
        device = "cuda" if chosen == "triton" else "cpu"
        leaves = [x.detach().to(device, to).requires_grad_() for x in (small.hidden, small.weight)]
        loss = cross_entropy(*leaves, small.labels.to(device), epsilon=EPSILON, backend=chosen).loss
        grads = torch.autograd.grad(loss, leaves)
        return SimpleNamespace(loss=loss.detach().cpu(), grads=[grad.cpu() for grad in grads])

    have, exact, peer = run(backend, kind), run("reference", torch.float64), run("reference", kind)
    harness.assert_kept("loss", have.loss, exact.loss, peer.loss, exact.loss.abs() * 2, kind)
    for name, ours, right, theirs in zip(("dhidden", "dweight"), have.grads, exact.grads, peer.grads, strict=True):
        harness.assert_kept(name, ours, right, theirs, right.abs() + right.abs().mean(), kind)


def ours(problem: Problem, backend: str = "cpu") -> Contender:
    def forward() -> Tensor:
        return cross_entropy(problem.hidden, problem.weight, problem.labels, epsilon=EPSILON, backend=backend).loss

    return _contender(backend, forward, problem)


def plain(problem: Problem) -> Contender:
    def forward() -> Tensor:
        return _smoothed(F.linear(problem.hidden, problem.weight), problem)

    return _contender("torch", forward, problem)


def f32_logits(problem: Problem) -> Contender:
    def forward() -> Tensor:
        return _smoothed(F.linear(problem.hidden, problem.weight).float(), problem)

    return _contender("torch_f32logits", forward, problem)


def _smoothed(logits: Tensor, problem: Problem) -> Tensor:
    return F.cross_entropy(logits, problem.labels, reduction="sum", label_smoothing=problem.smoothing)


def _contender(name: str, forward: Callable[[], Tensor], problem: Problem) -> Contender:
    leaves = (problem.hidden, problem.weight)
    return Contender(name, lambda: forward().float(), leaves, torch.ones(()), packed=lambda out: out.reshape(1))


CONTENDERS: dict[str, Callable[..., Contender]] = {"cpu": ours, "torch": plain, "torch_f32logits": f32_logits}

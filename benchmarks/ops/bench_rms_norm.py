"""Cases of rms_norm and its peers: torch's rms_norm, and transformers' T5LayerNorm written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Phase, Work
from benchmarks.ops import layer_norm_peer as shared
from benchmarks.ops.layer_norm_peer import EPS, OURS, Problem, Spec
from ofakern.ops.rms_norm import rms_norm

OP = "rms_norm"
HARNESS = "test_rms_norm"
PHASES: tuple[Phase, ...] = ("fwd", "fwd+bwd")
make, reduced = shared.make, shared.reduced
ABOUT = {
    "torch": "torch.nn.functional.rms_norm, weight in the activations' dtype",
    "t5": "the formula of transformers' T5LayerNorm: variance in float32, rounded, then scaled",
}
CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("64mb", "activations of 64 MB, D768", 64 << 20, quick=True),
        Spec("t5_base", "2048 tokens of D768 in float32 (6 MB)", 2048 * 768 * 4),
    )
}


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """Forward reads x and writes out: 2 arrays. Backward reads dout and x and writes dx: 3 arrays."""
    arrays = 5 if phase == "fwd+bwd" else 2
    return Work(0.0, float(arrays * spec.rows(dtype) * spec.width * DTYPES[dtype].itemsize))


def verify(spec: Spec, dtype: str, harness: Any) -> None:
    """Raises AssertionError when our kernel breaks the rule at the case's width."""
    x, weight, dout = harness.inputs(70, spec.width, DTYPES[dtype])
    harness.check(x, weight, dout, harness.run(rms_norm, x, weight, dout, backend=OURS))


def ours(problem: Problem) -> Contender:
    p = problem
    return Contender(OURS, lambda: rms_norm(p.x, p.weight, EPS, backend=OURS), (p.x, p.weight), p.dout)


def plain(problem: Problem) -> Contender:
    p, (weight, _) = problem, problem.peer_affine()

    def forward() -> Tensor:
        return torch.nn.functional.rms_norm(p.x, (p.spec.width,), weight, EPS)

    return Contender("torch", forward, (p.x, weight), p.dout)


def t5(problem: Problem) -> Contender:
    p, (weight, _) = problem, problem.peer_affine()

    def forward() -> Tensor:
        variance = p.x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        normed = p.x * torch.rsqrt(variance + EPS)
        return weight * normed.to(weight.dtype)

    return Contender("t5", forward, (p.x, weight), p.dout)


CONTENDERS: dict[str, Callable[[Any], Contender]] = {OURS: ours, "torch": plain, "t5": t5}

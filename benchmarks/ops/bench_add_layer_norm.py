"""Cases of add_layer_norm and its peer: dropout, addition and layer_norm as torch's separate ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Phase, Work
from benchmarks.moved import runner
from benchmarks.ops import layer_norm_peer as shared
from benchmarks.ops.layer_norm_peer import EPS, OURS, Problem, Spec
from ofakern.ops.layer_norm import add_layer_norm

OP = "add_layer_norm"
HARNESS = "layer_norm_cases"
DEVICES = ("cpu", "cuda")
PHASES = shared.PHASES
make, reduced = shared.make, shared.reduced
ABOUT = {"torch": "residual + dropout(x), then layer_norm: separate ops of torch, weights in the activations' dtype"}
CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("64mb", "activations of 64 MB, D768", 64 << 20, quick=True),
        Spec("64mb_dropout", "activations of 64 MB, D768, dropout 0.1", 64 << 20, dropout=0.1),
        Spec("1024_tokens", "about 1024 tokens of D768 (3 MB)", 3 << 20),
    )
}


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """Forward reads x and residual and writes out and their sum: 4 arrays, 9 operations an element. Backward reads dout
    and the sum and writes one gradient (two with dropout): 3 or 4 arrays, 11 operations. Statistics and the vectors of
    width D are not counted, nor is the generator."""
    array = spec.rows(dtype) * spec.width
    arrays, operations = 4, 9
    if phase == "fwd+bwd":
        arrays += 4 if spec.dropout else 3
        operations += 11
    return Work(0.0, float(arrays * array * DTYPES[dtype].itemsize), {"vector": float(operations * array)})


def verify(spec: Spec, dtype: str, harness: Any, backend: str = OURS) -> None:
    """Raises AssertionError when our kernel breaks the rule at the case's width."""
    case = harness.make_case("add", 1, 70, spec.width, dtype=DTYPES[dtype], dropout_p=spec.dropout)
    harness.check(case, runner(backend, harness.run_on(backend)))


def ours(problem: Problem, backend: str = OURS) -> Contender:
    p = problem
    rate, seed = p.spec.dropout, p.seed if p.spec.dropout else None

    def forward() -> tuple[Tensor, Tensor]:
        return add_layer_norm(p.x, p.residual, p.weight, p.bias, EPS, rate, seed, backend=backend)

    leaves = (p.x, p.residual, p.weight, p.bias)
    return Contender(backend, forward, leaves, (p.dout, p.dout), steps={"reused": _reused(problem)})


def _reused(problem: Problem) -> Callable[[], Tensor]:
    p, made = problem, []
    rate, seed = p.spec.dropout, p.seed if p.spec.dropout else None

    def call() -> Tensor:
        if not made:
            made.append((*shared.forward_scratch(p), torch.empty_like(p.x)))
        out, stats, scratch, total = made[0]
        inputs = (p.x.detach(), p.residual.detach(), p.weight.detach(), p.bias.detach(), EPS, seed, rate)
        shared.kernels().add_layer_norm_forward(out, total, stats, scratch, *inputs, torch.get_num_threads())
        return out

    return call


def plain(problem: Problem) -> Contender:
    p, made = problem, []
    weight, bias = p.peer_affine()

    def forward() -> tuple[Tensor, Tensor]:
        total = p.residual + torch.nn.functional.dropout(p.x, p.spec.dropout)
        return torch.nn.functional.layer_norm(total, (p.spec.width,), weight, bias, EPS), total

    @torch.no_grad()
    def reused() -> Tensor:
        if not made:
            rows = (p.x.shape[0], 1)
            made.append((torch.empty_like(p.x), torch.empty_like(p.x), torch.empty(rows), torch.empty(rows)))
        out, total, mean, rstd = made[0]
        torch.add(p.residual, torch.nn.functional.dropout(p.x, p.spec.dropout), out=total)
        statistics = (mean.to(p.dtype), rstd.to(p.dtype)) if p.dtype != torch.float32 else (mean, rstd)
        torch.ops.aten.native_layer_norm.out(
            total, (p.spec.width,), weight, bias, EPS, out0=out, out1=statistics[0], out2=statistics[1]
        )
        return out

    # Another generator: only without dropout are the numbers ours.
    exact = p.spec.dropout == 0.0
    leaves = (p.x, p.residual, weight, bias)
    return Contender("torch", forward, leaves, (p.dout, p.dout), exact=exact, steps={"reused": reused})


CONTENDERS: dict[str, Callable[..., Contender]] = {OURS: ours, "torch": plain}

"""Cases of gelu_layer_norm and its peer: gelu and layer_norm as torch's separate ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Phase, Work
from benchmarks.moved import runner
from benchmarks.ops import layer_norm_peer as shared
from benchmarks.ops.layer_norm_peer import EPS, OURS, Problem, Spec
from ofakern.ops.layer_norm import gelu_layer_norm

OP = "gelu_layer_norm"
HARNESS = "layer_norm_cases"
DEVICES = ("cpu", "cuda")
PHASES = shared.PHASES
make, reduced = shared.make, shared.reduced
ABOUT = {"torch": "gelu, then layer_norm: separate ops of torch, weights in the activations' dtype"}
CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("64mb", "activations of 64 MB, D3072", 64 << 20, 3072, quick=True),
        Spec("1024_tokens", "1024 tokens of D3072 in float32 (12 MB)", 12 << 20, 3072),
    )
}


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """Forward reads x and writes out: 2 arrays, one erf an element. Backward reads dout and x and writes dx: 3 arrays,
    an erf and the density's exp."""
    array = spec.rows(dtype) * spec.width
    arrays, erf, exp = (5, 2, 1) if phase == "fwd+bwd" else (2, 1, 0)
    other = {"erf": float(erf * array)} | ({"exp": float(exp * array)} if exp else {})
    return Work(0.0, float(arrays * array * DTYPES[dtype].itemsize), other)


def verify(spec: Spec, dtype: str, harness: Any, backend: str = OURS) -> None:
    """Raises AssertionError when our kernel breaks the rule at the case's width."""
    case = harness.make_case("gelu", 1, 70, spec.width, dtype=DTYPES[dtype])
    harness.check(case, runner(backend, harness.run_on(backend)))


def ours(problem: Problem, backend: str = OURS) -> Contender:
    p, made = problem, []

    def forward() -> Tensor:
        return gelu_layer_norm(p.x, p.weight, p.bias, EPS, backend=backend)

    def reused() -> Tensor:
        if not made:
            made.append(shared.forward_scratch(p))
        inputs = (p.x.detach(), p.weight.detach(), p.bias.detach(), EPS)
        shared.kernels().gelu_layer_norm_forward(*made[0], *inputs, torch.get_num_threads())
        return made[0][0]  # type: ignore[no-any-return]

    return Contender(backend, forward, (p.x, p.weight, p.bias), p.dout, steps={"reused": reused})


def plain(problem: Problem) -> Contender:
    p, made = problem, []
    weight, bias = p.peer_affine()

    def forward() -> Tensor:
        z = torch.nn.functional.gelu(p.x)
        return torch.nn.functional.layer_norm(z, (p.spec.width,), weight, bias, EPS)

    @torch.no_grad()
    def reused() -> Tensor:
        if not made:
            rows = (p.x.shape[0], 1)
            made.append((torch.empty_like(p.x), torch.empty_like(p.x), *(torch.empty(rows, dtype=p.dtype),) * 2))
        out, z, mean, rstd = made[0]
        torch.ops.aten.gelu.out(p.x, out=z)
        torch.ops.aten.native_layer_norm.out(
            z, (p.spec.width,), weight, bias, EPS, out0=out, out1=mean, out2=rstd.clone()
        )
        return out  # type: ignore[no-any-return]

    return Contender("torch", forward, (p.x, weight, bias), p.dout, steps={"reused": reused})


CONTENDERS: dict[str, Callable[..., Contender]] = {OURS: ours, "torch": plain}

"""Cases of linear: the gradient of weight and bias alone, and a whole step of the layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Output, Phase, Work
from ofakern.ops.linear import linear

OP = "linear"
HARNESS = "test_linear"
PHASES: tuple[Phase, ...] = ("dweight", "fwd+bwd")
ABOUT = {"torch": "torch's product dy^T x and its sum over dy's rows; in a whole step torch.nn.functional.linear"}


@dataclass(frozen=True)
class Spec:
    """rows N of width I to width O."""

    name: str
    description: str
    rows: int
    width: int
    out: int
    quick: bool = False
    default: bool = True


CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("n4096_768_768", "4096 tokens, a projection of OFA-base's attention, D768", 4096, 768, 768),
        Spec("n4096_768_3072", "4096 tokens, fc1 of OFA-base, 768 to 3072", 4096, 768, 3072),
        Spec("n4096_3072_768", "4096 tokens, fc2 of OFA-base, 3072 to 768", 4096, 3072, 768),
        Spec("n512_768_768", "512 tokens, D768: the fewest that `auto` gives to the kernel", 512, 768, 768, quick=True),
    )
}


@dataclass(frozen=True)
class Problem:
    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor


def make(spec: Spec, dtype: str) -> Problem:
    """Inputs drawn from a fixed seed, all but dy asking for a gradient."""
    generator = torch.Generator().manual_seed(1)
    shapes = (spec.rows, spec.width), (spec.out, spec.width), (spec.out,), (spec.rows, spec.out)
    x, weight, bias, dy = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for shape in shapes)
    return Problem(x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), dy)


def reduced(spec: Spec) -> Spec:
    """The same case, small: warms up before memory is measured."""
    return replace(spec, rows=64, width=64, out=96)


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """One product, three in a whole step; each reads two of the three arrays and writes the third."""
    products = 3 if phase == "fwd+bwd" else 1
    arrays = spec.rows * (spec.width + spec.out) + spec.width * spec.out
    flops = 2.0 * spec.rows * spec.width * spec.out
    return Work(flops * products, float(arrays * DTYPES[dtype].itemsize * products))


def verify(spec: Spec, dtype: str, harness: Any) -> None:
    """Raises AssertionError when our kernel breaks the rule at the case's widths."""
    given = harness.inputs(300, spec.out, spec.width, DTYPES[dtype])
    harness.check(given, harness.run(linear, *given, backend="cpu"))


def ours(problem: Problem) -> Contender:
    p = problem

    def gradient() -> Output:
        found: tuple[Tensor, Tensor] = torch.ops.ofakern.linear_bwd(p.dy, p.x.detach(), True)
        return found

    return _contender("cpu", p, lambda: linear(p.x, p.weight, p.bias, backend="cpu"), gradient)


def plain(problem: Problem) -> Contender:
    p = problem

    def gradient() -> Output:
        return p.dy.t() @ p.x.detach(), p.dy.sum(0)

    return _contender("torch", p, lambda: F.linear(p.x, p.weight, p.bias), gradient)


def _contender(name: str, p: Problem, forward: Callable[[], Tensor], gradient: Callable[[], Output]) -> Contender:
    return Contender(name, forward, (p.x, p.weight, p.bias), p.dy, steps={"dweight": gradient})


CONTENDERS: dict[str, Callable[[Any], Contender]] = {"cpu": ours, "torch": plain}

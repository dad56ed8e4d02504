"""Cases of decode_linear and its peers: one decoding step's projections of OFA-base's six decoder layers.

Every layer has its own weights, as in a search, so that they come from memory or the last cache, not from a nearer one.

torch      F.linear on each weight; query, key and value as one weight, as ours.
cpu_int8   ours with int8 weights: other numbers (the weights are rounded), a half or a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Phase, Work
from ofakern.ops.decode_linear import decode_linear, prepack_weight
from ofakern.ops.decode_linear.reference import decode_linear_reference, quantize_rows

OP = "decode_linear"
OURS = "cpu"
PHASES = ("fwd",)
ABOUT = {"torch": "F.linear", "cpu_int8": "ours, weights rounded to int8"}
LAYERS = 6
# Outputs and inputs: q, k, v together; their output; cross query and output; the two of the FFN.
SHAPES = ((2304, 768), (768, 768), (768, 768), (768, 768), (3072, 768), (768, 3072))


@dataclass(frozen=True)
class Spec:
    """rows: beams times samples of a step."""

    name: str
    description: str
    rows: int
    quick: bool = False
    default: bool = True


CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("m5", "5 rows: one sample, beam 5", 5, quick=True),
        Spec("m20", "20 rows: four samples, beam 5", 20),
        Spec("m80", "80 rows: sixteen samples, beam 5", 80),
    )
}


@dataclass
class Problem:
    """x by depth; weights and biases in the order of a step."""

    spec: Spec
    dtype: torch.dtype
    x: dict[int, Tensor]
    weights: list[Tensor]
    biases: list[Tensor]


def make(spec: Spec, dtype: str) -> Problem:
    """Inputs drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DTYPES[dtype])

    shapes = SHAPES * LAYERS
    weights = [normal(n, k) * k**-0.5 for n, k in shapes]
    x = {k: normal(spec.rows, k) for k in (768, 3072)}
    return Problem(spec, DTYPES[dtype], x, weights, [normal(n) for n, _ in shapes])


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """2 M N K operations; every weight read once (its own dtype), rows read and written."""
    item = DTYPES[dtype].itemsize
    elements = sum(n * k for n, k in SHAPES) * LAYERS
    rows = sum(n + k for n, k in SHAPES) * LAYERS * spec.rows
    return Work(2.0 * spec.rows * elements, float(item * (elements + rows)), cold=True)


def verify(spec: Spec, dtype: str, harness: Any) -> None:
    """Raises AssertionError when a product of one layer is wrong, int8 weights included."""
    problem = make(spec, dtype)
    for weight, bias in zip(problem.weights[: len(SHAPES)], problem.biases, strict=False):
        x = problem.x[weight.shape[1]]
        for int8 in (False, True):
            packed = prepack_weight(weight, bias, int8=int8)
            got = decode_linear(x, packed)
            used = weight if packed.scale is None else prepacked_values(weight)
            exact = decode_linear_reference(x.double(), used.double(), None, bias.double())
            peer = decode_linear_reference(x, used.to(x.dtype), None, bias)
            size = decode_linear_reference(x.double().abs(), used.double().abs(), None, bias.double().abs())
            harness.assert_kept("out", got, exact, peer, size, x.dtype)


def prepacked_values(weight: Tensor) -> Tensor:
    """What an int8 weight stands for."""
    stored, scale = quantize_rows(weight)
    return stored * scale[:, None]


def _ours(problem: Problem, name: str, int8: bool) -> Contender:
    packed = [prepack_weight(w, b, int8=int8) for w, b in zip(problem.weights, problem.biases, strict=True)]

    def forward() -> Tensor:
        outputs = [decode_linear(problem.x[weight.depth], weight) for weight in packed]
        return torch.cat(outputs[: len(SHAPES)], dim=1)  # type: ignore[arg-type]

    return Contender(name, forward, exact=not int8)


def ours(problem: Problem) -> Contender:
    return _ours(problem, OURS, False)


def ours_int8(problem: Problem) -> Contender:
    return _ours(problem, "cpu_int8", True)


def plain(problem: Problem) -> Contender:
    def forward() -> Tensor:
        outputs = [F.linear(problem.x[w.shape[1]], w, b) for w, b in zip(problem.weights, problem.biases, strict=True)]
        return torch.cat(outputs[: len(SHAPES)], dim=1)

    return Contender("torch", forward)


CONTENDERS: dict[str, Callable[[Any], Contender]] = {OURS: ours, "torch": plain, "cpu_int8": ours_int8}

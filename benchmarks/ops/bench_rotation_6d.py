"""Cases of rotation_6d and its peer: Gram-Schmidt as torch's separate ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Phase, Work
from benchmarks.moved import runner
from ofakern.ops.rotation_6d import rotation_6d
from ofakern.ops.rotation_6d.reference import rotation_6d_reference

OP = "rotation_6d"
OURS = "cpu"
DEVICES = ("cpu", "cuda")
ABOUT = {"torch": "normalize, a dot product, normalize, cross, stack: separate ops of torch"}


@dataclass(frozen=True)
class Spec:
    name: str
    description: str
    rotations: int
    quick: bool = False
    default: bool = True


CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("motion_batch", "32 motions of 120 frames, 52 joints", 32 * 120 * 52, quick=True),
        Spec("one_motion", "one motion of 120 frames, 22 joints", 120 * 22),
    )
}


@dataclass
class Problem:
    x: Tensor
    dout: Tensor


def make(spec: Spec, dtype: str) -> Problem:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(spec.rotations, 6, generator=generator).to(DTYPES[dtype])
    return Problem(x.requires_grad_(), torch.randn(spec.rotations, 3, 3, generator=generator).to(DTYPES[dtype]))


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """Forward reads 6 numbers and writes 9, some 40 operations; backward reads 15 and writes 6, some 130."""
    numbers, operations = (36, 170) if phase == "fwd+bwd" else (15, 40)
    moved = spec.rotations * numbers * DTYPES[dtype].itemsize
    return Work(0.0, float(moved), {"vector": float(spec.rotations * operations)})


def verify(spec: Spec, dtype: str, harness: Any, backend: str = OURS) -> None:
    """Raises AssertionError when our kernel breaks the rule."""
    x = make(spec, dtype).x.detach()
    exact = rotation_6d_reference(x.double())
    growth = 1 + x.double()[:, 3:].norm(dim=1) / torch.linalg.cross(exact[..., 0], x.double()[:, 3:]).norm(dim=1)
    size = growth[:, None, None] * torch.ones_like(exact)
    out = runner(backend, lambda x: {"out": rotation_6d(x, backend=backend)})(x)["out"]
    harness.assert_kept("out", out, exact, _plain(x), size, x.dtype)


def ours(problem: Problem, backend: str = OURS) -> Contender:
    return Contender(backend, lambda: rotation_6d(problem.x, backend=backend), (problem.x,), problem.dout)


def _plain(x: Tensor) -> Tensor:
    b1 = torch.nn.functional.normalize(x[:, :3], dim=1)
    rest = x[:, 3:] - (b1 * x[:, 3:]).sum(1, keepdim=True) * b1
    b2 = torch.nn.functional.normalize(rest, dim=1)
    return torch.stack([b1, b2, torch.linalg.cross(b1, b2, dim=1)], dim=2)


def plain(problem: Problem) -> Contender:
    return Contender("torch", lambda: _plain(problem.x), (problem.x,), problem.dout)


CONTENDERS: dict[str, Callable[[Any], Contender]] = {OURS: ours, "torch": plain}

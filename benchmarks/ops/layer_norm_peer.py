"""What the benchmarks of the fused LayerNorms share: shapes, the count of work, and calls into results that exist.

The phase `reused` writes into result tensors made before, which shows the kernels alone. `fwd` makes its results. Ours
then stand in memory that is kept for a moment after the last call's (`csrc/core/kept_memory.h`); torch gets fresh
pages for 64 MB from the operating system in every call, which writes zeros into them first. That costs more than the
arithmetic: torch's own copy into a new tensor runs at a quarter of the bandwidth of a copy into one that is there.
Ours is the compiled kernel, the peer torch's own kernels with `out=`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import DTYPES, Phase
from ofakern.ops import native

OURS = "cpu"
PHASES: tuple[Phase, ...] = ("fwd", "fwd+bwd", "reused")
EPS = 1e-5


@dataclass(frozen=True)
class Spec:
    """A case: activations `[rows, width]` of `bytes` bytes in the timed dtype."""

    name: str
    description: str
    bytes: int
    width: int = 768
    dropout: float = 0.0
    quick: bool = False
    default: bool = True

    def rows(self, dtype: str) -> int:
        return max(1, self.bytes // (self.width * DTYPES[dtype].itemsize))


@dataclass
class Problem:
    spec: Spec
    dtype: torch.dtype
    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    dout: Tensor
    seed: Tensor

    def peer_affine(self) -> tuple[Tensor, Tensor]:
        """Weight and bias in x's dtype, as torch's LayerNorm wants them, made before timing."""
        weight, bias = self.weight.detach().to(self.dtype), self.bias.detach().to(self.dtype)
        return weight.requires_grad_(), bias.requires_grad_()


def make(spec: Spec, dtype: str) -> Problem:
    """Inputs from a fixed seed, all asking for a gradient; weight and bias are float32."""
    generator = torch.Generator().manual_seed(1)
    rows, kind = spec.rows(dtype), DTYPES[dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Problem(
        spec,
        kind,
        normal(rows, spec.width).to(kind).requires_grad_(),
        normal(rows, spec.width).to(kind).requires_grad_(),
        (1 + 0.1 * normal(spec.width)).requires_grad_(),
        normal(spec.width).requires_grad_(),
        normal(rows, spec.width).to(kind),
        torch.tensor([1, 2]),
    )


def reduced(spec: Spec) -> Spec:
    """The same case with few rows: for warming up and for the proof."""
    return Spec(spec.name, spec.description, 64 * spec.width * 4, spec.width, spec.dropout)


def kernels() -> Any:
    return native.cpu


def forward_scratch(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(out, stats, workspace) for a forward kernel."""
    threads = torch.get_num_threads()
    scratch = torch.empty(kernels().layer_norm_forward_workspace(problem.spec.width, threads), dtype=torch.uint8)
    return torch.empty_like(problem.x), torch.empty(problem.x.shape[0], 2), scratch

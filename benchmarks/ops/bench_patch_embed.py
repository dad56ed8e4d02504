"""Cases of patch_embed and its peers: uint8 images to normalised tokens, ImageNet's mean and std, every embedding.

linear   pixels normalised to the dtype, patches copied out by a reshape, F.linear, additions, F.layer_norm.
conv     pixels normalised to the dtype, a Conv2d whose stride is its kernel, transposed, additions, F.layer_norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Phase, Work
from benchmarks.moved import runner
from ofakern.ops.patch_embed import patch_embed

OP = "patch_embed"
OURS = "cpu"
DEVICES = ("cpu", "cuda")
ABOUT = {
    "linear": "normalised pixels, reshape, F.linear, additions, F.layer_norm",
    "conv": "normalised pixels, Conv2d, transpose, additions, F.layer_norm",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Spec:
    """images: RGB, uint8, planar, `side` x `side`; width: D."""

    name: str
    description: str
    images: int
    side: int
    patch: int
    width: int
    quick: bool = False
    default: bool = True

    @property
    def cells(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def depth(self) -> int:
        return 3 * self.patch**2


CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("u8_480_p16_d768", "32 images of 480 x 480, patch 16, D768", 32, 480, 16, 768),
        Spec("u8_480_p16_d768_b128", "128 images of 480 x 480, patch 16, D768", 128, 480, 16, 768, default=False),
        Spec("u8_224_p16_d768", "8 images of 224 x 224, patch 16, D768", 8, 224, 16, 768, quick=True),
        Spec("u8_224_p16_d768_b1", "one image of 224 x 224, patch 16, D768", 1, 224, 16, 768),
    )
}


@dataclass
class Problem:
    """A case's random inputs; parameters in the order of `leaves`."""

    spec: Spec
    dtype: torch.dtype
    images: Tensor
    weight: Tensor
    bias: Tensor
    type_embedding: Tensor
    position: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    dout: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.weight, self.bias, self.type_embedding, self.position, self.ln_weight, self.ln_bias)

    def run(self, backend: str = OURS) -> Tensor:
        weight, bias, type_embedding, position, ln_weight, ln_bias = self.leaves
        return patch_embed(
            self.images,
            weight,
            bias,
            mean=MEAN,
            std=STD,
            type_embedding=type_embedding,
            position=position,
            ln_weight=ln_weight,
            ln_bias=ln_bias,
            backend=backend,
        )

    def to(self, dtype: torch.dtype, images: int | None = None) -> Problem:
        """The same numbers in another dtype, as new leaves; only the first images."""
        leaves = (leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves)
        count = self.spec.images if images is None else images
        return Problem(
            replace(self.spec, images=count),
            dtype,
            self.images[:count],
            *leaves,
            self.dout[: count * self.spec.cells].to(dtype),
        )


def make(spec: Spec, dtype: str) -> Problem:
    """Inputs drawn from a fixed seed, all parameters asking for a gradient and of the case's dtype."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(DTYPES[dtype]).requires_grad_()

    shape = (spec.images, 3, spec.side, spec.side)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    weight = leaf(spec.width, 3, spec.patch, spec.patch, scale=spec.depth**-0.5)
    vectors = [leaf(spec.width) for _ in range(4)]
    position = leaf(spec.cells, spec.width)
    dout = leaf(spec.images * spec.cells, spec.width).detach()
    return Problem(spec, DTYPES[dtype], images, weight, *vectors[:2], position, *vectors[2:], dout)


def reduced(spec: Spec) -> Spec:
    """The same case, small enough to warm up with."""
    return replace(spec, images=min(spec.images, 2), side=spec.patch * 4)


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """The least work of a case: 2 N K D operations forward and as many for the weight's gradient (pixels have none).

    Bytes: pixels (1 byte) and parameters read, tokens written; backward reads pixels, dout and tokens' parameters
    again and writes the gradients. Normalising, adding and LayerNorm are not counted.
    """
    tokens, item = spec.images * spec.cells, DTYPES[dtype].itemsize
    product = 2.0 * tokens * spec.depth * spec.width
    parameters = item * (spec.width * (spec.depth + 4) + spec.cells * spec.width)
    moved = tokens * spec.depth + parameters + item * tokens * spec.width
    if phase == "fwd+bwd":
        return Work(2 * product, float(2 * moved + parameters))
    return Work(product, float(moved))


def _results(problem: Problem, backend: str) -> dict[str, Tensor]:
    out = problem.run(backend)
    grads = torch.autograd.grad(out, problem.leaves, problem.dout)
    return {"out": out.detach()} | {f"gradient {n}": grad for n, grad in enumerate(grads)}


def verify(spec: Spec, dtype: str, harness: Any, backend: str = OURS) -> None:
    """Raises AssertionError when our kernel is wrong: every gradient reduced, then tokens of the timed call itself."""
    small = make(reduced(spec), dtype)
    _keep(harness, runner(backend, partial(_results, backend=backend))(small), small)
    problem = make(spec, dtype)
    with torch.no_grad():
        out = runner(backend, lambda own: {"out": own.run(backend)})(problem)["out"][-spec.cells :]
        last = replace(problem.to(problem.dtype), images=problem.images[-1:])
        exact, peer = last.to(torch.float64, 1).run("reference"), last.run("reference")
    harness.assert_kept("out", out, exact, peer, torch.full_like(exact, exact.abs().max()), problem.dtype)


def _keep(harness: Any, got: dict[str, Tensor], problem: Problem) -> None:
    exact, peer = _results(problem.to(torch.float64), "reference"), _results(problem, "reference")
    for name, want in exact.items():
        size = torch.full_like(want, want.abs().max())
        harness.assert_kept(name, got[name], want, peer[name], size, problem.dtype)


def _normaliser(problem: Problem) -> Callable[[], Tensor]:
    """What makes `[n,3,side,side]` in the dtype, as a data pipeline hands over."""
    mean, std = (torch.tensor(x, device=problem.images.device).view(3, 1, 1) for x in (MEAN, STD))
    return lambda: ((problem.images.float() / 255 - mean) / std).to(problem.dtype)


def _finish(problem: Problem, rows: Tensor) -> Tensor:
    """Embeddings and LayerNorm of `[n, cells, D]`."""
    rows = rows + problem.position + problem.type_embedding
    return F.layer_norm(rows, rows.shape[-1:], problem.ln_weight, problem.ln_bias).flatten(0, 1)


def ours(problem: Problem, backend: str = OURS) -> Contender:
    return Contender(backend, partial(problem.run, backend), problem.leaves, problem.dout)


def linear(problem: Problem) -> Contender:
    normalised = _normaliser(problem)

    def forward() -> Tensor:
        spec, grid = problem.spec, problem.spec.side // problem.spec.patch
        x = normalised().view(spec.images, 3, grid, spec.patch, grid, spec.patch)
        rows = x.permute(0, 2, 4, 1, 3, 5).reshape(spec.images, spec.cells, spec.depth)
        return _finish(problem, F.linear(rows, problem.weight.flatten(1), problem.bias))

    return Contender("linear", forward, problem.leaves, problem.dout)


def conv(problem: Problem) -> Contender:
    normalised = _normaliser(problem)

    def forward() -> Tensor:
        x = F.conv2d(normalised(), problem.weight, problem.bias, stride=problem.spec.patch)
        return _finish(problem, x.flatten(2).transpose(1, 2))

    return Contender("conv", forward, problem.leaves, problem.dout)


CONTENDERS: dict[str, Callable[[Any], Contender]] = {OURS: ours, "linear": linear, "conv": conv}

"""What a benchmark of an op is made of: cases, contenders and the work they are measured by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Phase = Literal["fwd", "fwd+bwd"]
PHASES: tuple[Phase, ...] = ("fwd", "fwd+bwd")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Unavailable(Exception):
    """A peer cannot run a case here; the message is the reason that stands in the results."""


class Work(NamedTuple):
    """The least that a phase has to do: floating-point operations, and bytes read and written once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    forward: gives the output in the contender's own layout; leaves: what the backward pass differentiates; dout: the
    incoming gradient; packed: the output in the packed layout, for comparison. forward_only: why there is no backward.
    exact: computes the case's own function (a peer that leaves out the bias does not).
    """

    name: str
    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    dout: Tensor
    packed: Callable[[Tensor], Tensor]
    exact: bool = True
    compiled: bool = False
    forward_only: str | None = None

    def call(self, phase: Phase) -> Callable[[], Tensor]:
        """The function to time; returns the output. Raises Unavailable when the contender has no such phase."""
        if phase == "fwd":
            return self._without_gradient
        if self.forward_only is not None:
            raise Unavailable(self.forward_only)
        return self._step

    def _without_gradient(self) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def _step(self) -> Tensor:
        out = self.forward()
        torch.autograd.grad(out, self.leaves, self.dout)
        return out.detach()


class CaseSpec(Protocol):
    """What the runner needs to know of a case; the rest is the op's own."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def quick(self) -> bool: ...
    @property
    def default(self) -> bool: ...


class OpBench(Protocol):
    """What a module `benchmarks.ops.bench_<op>` offers. The first contender is ours."""

    OP: str
    CASES: Mapping[str, Any]
    CONTENDERS: Mapping[str, Callable[[Any], Contender]]
    SLOW_CONTENDERS: frozenset[str]

    def make(self, spec: Any, dtype: str) -> Any: ...
    def reduced(self, spec: Any) -> Any: ...
    def work(self, spec: Any, dtype: str, phase: Phase) -> Work: ...
    def verify(self, spec: Any, dtype: str, harness: Any) -> None: ...

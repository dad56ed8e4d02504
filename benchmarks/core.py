"""What a benchmark is made of: cases, contenders and the work they are measured by.

The seam: a module `benchmarks/ops/bench_<op>.py` (or `benchmarks/model/bench_<name>.py`) offers

    OP                                  its name, that of the file
    CASES                               name -> spec, any object that fits `CaseSpec`
    CONTENDERS                          name -> build(problem) -> Contender, ours first; may raise `Unavailable`
    make(spec, dtype) -> problem        the case's random inputs, made before timing
    work(spec, dtype, phase) -> Work    the least that a phase does, the same for every contender
    verify(spec, dtype, harness)        raises AssertionError unless our kernel is right on the case

and, only where the default does not fit,

    HARNESS = "rule"                    the module of tests/ops that proves the op; `verify` gets it
    PHASES = ("fwd", "fwd+bwd")         ("fwd",) where there is no gradient; others come from `Contender.steps`
    TIMED_DTYPES = ("f32", "bf16")      what runs without --dtype; a --dtype outside of it and f16 is refused
    AGREEMENT = {...}                   relative L2 to which contenders agree, by dtype
    SLOW_CONTENDERS = frozenset()       what --quick leaves out
    reduced(spec) -> spec               a smaller case that warms up before memory is measured; else the case itself
    ABOUT = {peer: one line}            for docs/BENCHMARKS.md
    MEMORY_PEER = "..."                 whose memory stands beside ours there; else the first peer
    extras(record, records, roof)       more numbers for a record, from all of the run and the measured roofline
    DEVICES = ("cpu",)                  with "cuda": our `build` and `verify` take a backend as their last argument

`OpBench.of(module)` reads them; the runner, the report, the plots and pytest-benchmark know nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from ofakern.errors import OfakernRuntimeError

Phase = str
PHASES: tuple[Phase, ...] = ("fwd", "fwd+bwd")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
AGREEMENT = {"f32": 1e-4, "bf16": 3e-2, "f16": 5e-3}
Output = Tensor | tuple[Tensor, ...]


class Unavailable(Exception):
    """A peer cannot run a case here; the message is the reason that stands in the results."""


@dataclass(frozen=True)
class Work:
    """The least that a phase has to do.

    flops: of matrix products, at the GEMM rate of the dtype; bytes: read and written once; other: what runs outside
    matrix products, by kind (`roofline.KINDS`): "vector" float32 operations, "erf" and "exp" evaluations; cold: what
    is read once (weights, keys) and is more, with that of the other contenders in turn, than a last cache keeps for
    one of them: its bandwidth is that of the memory.
    """

    flops: float
    bytes: float
    other: Mapping[str, float] = field(default_factory=dict)
    cold: bool = False


def same(output: Any) -> Any:
    return output


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    forward: gives the output (or several) in the contender's own layout; leaves: what the backward pass differentiates;
    dout: the incoming gradient, one per output; packed: the output as one tensor that all contenders share, for
    comparison (the first of several outputs if it is not given). forward_only: why there is no backward.
    exact: computes the case's own function (a peer that leaves out the bias does not). steps: calls of phases other
    than fwd and fwd+bwd. compiled: making it has already run it on the case itself. details: numbers of the last call
    that belong into its record beside the times. share: the part of the case that a call computes; times are divided
    by it.
    """

    name: str
    forward: Callable[[], Output]
    leaves: tuple[Tensor, ...] = ()
    dout: Output | None = None
    packed: Callable[[Any], Tensor] = same
    exact: bool = True
    compiled: bool = False
    forward_only: str | None = None
    steps: Mapping[str, Callable[[], Output]] = field(default_factory=dict)
    details: Callable[[], Mapping[str, float]] | None = None
    share: float = 1.0

    def call(self, phase: Phase) -> Callable[[], Output]:
        """The function to time; returns the output. Raises Unavailable when the contender has no such phase."""
        if phase in self.steps:
            return self.steps[phase]
        if phase == "fwd":
            return self._without_gradient
        if phase != "fwd+bwd":
            raise Unavailable(f"it has no phase {phase}")
        if self.forward_only is not None:
            raise Unavailable(self.forward_only)
        return self._step

    def comparable(self, output: Output) -> Tensor:
        """The output as all contenders of a case give it."""
        if self.packed is same and isinstance(output, tuple):
            return output[0]
        return self.packed(output)

    def _without_gradient(self) -> Output:
        with torch.no_grad():
            return self.forward()

    def _step(self) -> Output:
        out = self.forward()
        torch.autograd.grad(out, self.leaves, self.dout)
        return tuple(x.detach() for x in out) if isinstance(out, tuple) else out.detach()


def tensors(output: Output) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


class CaseSpec(Protocol):
    """What the runner needs to know of a case; the rest is the op's own. default: runs without --case and --quick.

    A spec may have `phases` of its own: those of the op that its case has.
    """

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def quick(self) -> bool: ...
    @property
    def default(self) -> bool: ...


@dataclass(frozen=True)
class OpBench:
    """A benchmark module as the runner sees it; the module docstring says what each part is."""

    name: str
    cases: Mapping[str, Any]
    contenders: Mapping[str, Callable[..., Contender]]
    make: Callable[[Any, str], Any]
    work: Callable[[Any, str, Phase], Work]
    verify: Callable[..., None]
    harness: str
    phases: tuple[Phase, ...]
    dtypes: tuple[str, ...]
    agreement: Mapping[str, float]
    slow: frozenset[str]
    reduced: Callable[[Any], Any]
    about: Mapping[str, str]
    memory_peer: str | None
    devices: tuple[str, ...]
    extras: Callable[[Mapping[str, Any], list[dict[str, Any]], Mapping[str, Any]], Mapping[str, Any]] | None

    @property
    def ours(self) -> str:
        return next(iter(self.contenders))

    @staticmethod
    def of(module: ModuleType) -> OpBench:
        """Raises OfakernRuntimeError when the module lacks a part."""
        parts = ("OP", "CASES", "CONTENDERS", "make", "work", "verify")
        missing = [part for part in parts if not hasattr(module, part)]
        if missing:
            raise OfakernRuntimeError(f"bench: {module.__name__} must offer {', '.join(parts)}, got no {missing[0]}")
        peers = list(module.CONTENDERS)[1:]
        return OpBench(
            *(getattr(module, part) for part in parts),
            harness=getattr(module, "HARNESS", "rule"),
            phases=getattr(module, "PHASES", PHASES),
            dtypes=getattr(module, "TIMED_DTYPES", ("f32", "bf16")),
            agreement=AGREEMENT | getattr(module, "AGREEMENT", {}),
            slow=getattr(module, "SLOW_CONTENDERS", frozenset()),
            reduced=getattr(module, "reduced", same),
            about=getattr(module, "ABOUT", {}),
            memory_peer=getattr(module, "MEMORY_PEER", peers[0] if peers else None),
            devices=getattr(module, "DEVICES", ("cpu",)),
            extras=getattr(module, "extras", None),
        )

    def phases_of(self, spec: Any) -> tuple[Phase, ...]:
        """The phases that this case has."""
        phases: tuple[Phase, ...] = getattr(spec, "phases", self.phases)
        return phases

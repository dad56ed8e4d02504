"""Cases of decode_layers and its peer: the layers of one decoding step of OFA-base.

by_layer   the same state and packed weights, one op after the other, as steps run that one call does not cover.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Phase, Work
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import DecodeState, OFAConfig, OFAPlus
from ofakern.model.stacks import Memory

OP = "decode_layers"
OURS = "cpu"
PHASES = ("fwd",)
ABOUT = {"by_layer": "the same layers, one op after the other"}
_PAST = 8


@dataclass(frozen=True)
class Spec:
    """samples of `keys` source tokens, `beams` rows each; width: of the model."""

    name: str
    description: str
    samples: int
    beams: int
    keys: int
    width: int = 768
    layers: int = 6
    quick: bool = False
    default: bool = True

    def config(self) -> OFAConfig:
        shape = {"dim": self.width, "ffn_dim": 4 * self.width, "heads": self.width // 64}
        adaptors = (TextAdaptorConfig(),)
        return OFAConfig(
            vocab_size=64, encoder_layers=1, decoder_layers=self.layers, adaptors=adaptors, dropout=0.0, **shape
        )


CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("small_r6", "2 layers of width 64, 6 rows", 2, 3, 40, 64, 2, quick=True),
        Spec("r5_s932", "OFA-base: one sample of 932 source tokens, beam 5", 1, 5, 932),
        Spec("r20_s932", "OFA-base: four samples of 932 source tokens, beam 5", 4, 5, 932),
        Spec("r80_s932", "OFA-base: sixteen samples of 932 source tokens, beam 5", 16, 5, 932),
    )
}


@dataclass
class Problem:
    """A state that has been fed `_PAST` tokens, and the next ones."""

    spec: Spec
    model: OFAPlus
    memory: Memory
    tokens: Tensor

    def state(self) -> DecodeState:
        state = self.model.begin_decode(self.memory, self.spec.beams, _PAST + 8)
        for _ in range(_PAST):
            state.step(self.tokens)
        return state


def make(spec: Spec, dtype: str) -> Problem:
    """Weights and the encoder's output from fixed seeds; nothing of the model is zero."""
    model = OFAPlus(spec.config(), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
    tokens = spec.samples * spec.keys
    states, positions = (torch.randn(tokens, spec.width, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    memory = Memory(states, positions, (spec.keys,) * spec.samples)
    feed = torch.randint(4, 64, (spec.samples * spec.beams,), generator=generator)
    return Problem(spec, model.to(DTYPES[dtype]), memory, feed)


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """Products of all rows, attention to every source token and to the rows' own past; weights and keys read once."""
    rows, dim, item = spec.samples * spec.beams, spec.width, DTYPES[dtype].itemsize
    weights, source, own = 14 * dim * dim, 2 * spec.samples * spec.keys * dim, 2 * rows * (_PAST + 1) * dim
    flops = 2.0 * rows * weights + 4.0 * rows * dim * (spec.keys + _PAST + 1)
    return Work(spec.layers * flops, float(spec.layers * item * (weights + source + own)))


def verify(spec: Spec, dtype: str, harness: Any) -> None:
    """Raises AssertionError unless both ways give one result: exactly so up to torch's roundings of norms."""
    problem = make(CASES["small_r6"], dtype)
    have, want = (build(problem).forward() for build in (ours, by_layer))
    assert isinstance(have, Tensor) and isinstance(want, Tensor)
    error = float((have.double() - want.double()).norm() / want.double().norm())
    assert error <= 8 * torch.finfo(have.dtype).eps, error


def _steps(name: str, problem: Problem, reason: str | None) -> Contender:
    """reason: why not in one call, or None for one call. The weights are packed apart for each contender."""
    problem.model._decode_weights.clear()
    state = problem.state()
    state.weights.by_layer, state.weights.by_layer_asked = reason, True

    def forward() -> Tensor:
        state.rewind(_PAST)
        return state.step(problem.tokens)

    return Contender(name, forward)


def ours(problem: Problem) -> Contender:
    return _steps(OURS, problem, None)


def by_layer(problem: Problem) -> Contender:
    return _steps("by_layer", problem, "it is the peer")


CONTENDERS: dict[str, Callable[[Any], Contender]] = {OURS: ours, "by_layer": by_layer}

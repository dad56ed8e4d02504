"""Cases of beam_step and its peers: a step of beam 5 over OFA's vocabulary of 59,457 entries, 10 candidates a sample.

topk     torch: log_softmax in float32, plus the rows' sums, topk over each sample's rows.
masked   the same behind a mask of what each row may be followed by, made from the automaton (closed sets: the softmax
         is over what is allowed), as a search without this op does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.closed_sets import VOCABULARY, vqa_answers
from benchmarks.core import DTYPES, Contender, Phase, Unavailable, Work
from ofakern.generate import ChoiceTokens, compile_target
from ofakern.ops.beam_step import BeamCandidates, StepRules, beam_step

OP = "beam_step"
OURS = "cpu"
PHASES = ("fwd",)
ABOUT = {"topk": "log_softmax and topk", "masked": "an automaton's mask, log_softmax and topk"}
BEAMS = 5
WIDTH = 2 * BEAMS
PAD = 1


@dataclass(frozen=True)
class Spec:
    """rows: beams of all samples. closed: inside a closed set, every fifth at its root."""

    name: str
    description: str
    rows: int
    closed: bool = False
    quick: bool = False
    default: bool = True


CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("r5_v59457", "one sample, beam 5", 5),
        Spec("r80_v59457", "16 samples, beam 5", 80, quick=True),
        Spec("closed_3129", "16 samples, beam 5, in a closed set of 3,129 answers", 80, closed=True),
    )
}


@dataclass
class Problem:
    spec: Spec
    logits: Tensor
    sums: Tensor
    row_offsets: Tensor
    rules: StepRules
    allowed: Callable[[], Tensor] | None


def make(spec: Spec, dtype: str) -> Problem:
    """Inputs drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(spec.rows, VOCABULARY, generator=generator) * 3).to(DTYPES[dtype])
    sums = -torch.rand(spec.rows, generator=generator) * 5
    offsets = torch.arange(0, spec.rows + 1, BEAMS, dtype=torch.int32)
    if not spec.closed:
        return Problem(spec, logits, sums, offsets, StepRules(pad=PAD), None)
    automaton = compile_target([ChoiceTokens(vqa_answers())], eos=2, vocabulary_size=VOCABULARY)
    inner = (automaton.tables.first.diff() > 0).nonzero()[:, 0]
    states = inner[torch.randint(len(inner), (spec.rows,), generator=generator)]
    states[::BEAMS] = automaton.start
    rules = StepRules(pad=PAD, states=states.int(), tables=automaton.tables)
    return Problem(spec, logits, sums, offsets, rules, lambda: automaton.allowed(states))


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """Every logit that the softmax is over is read once and has one exponential."""
    problem = make(spec, dtype) if spec.closed else None
    looked_at = spec.rows * VOCABULARY if problem is None else int(problem.allowed().sum())  # type: ignore[misc]
    return Work(0.0, float(looked_at * DTYPES[dtype].itemsize), {"exp": float(looked_at)})


def verify(spec: Spec, dtype: str, harness: Any) -> None:
    """Raises AssertionError unless rows and tokens are the reference's and scores within two roundings."""
    have, want = _step(make(spec, dtype)), _step(make(spec, dtype), "reference")
    assert torch.equal(have.origins, want.origins) and torch.equal(have.tokens, want.tokens)
    torch.testing.assert_close(have.scores, want.scores, rtol=3e-7, atol=3e-7)


def _step(problem: Problem, backend: str = "auto") -> BeamCandidates:
    return beam_step(problem.logits, problem.sums, problem.row_offsets, WIDTH, problem.rules, backend=backend)


def ours(problem: Problem) -> Contender:
    return Contender(OURS, lambda: _step(problem))


def _best(scores: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    scores[:, PAD] = float("-inf")
    scores += problem.sums[:, None]
    best, places = scores.view(len(problem.row_offsets) - 1, -1).topk(WIDTH)
    return best, places // VOCABULARY, places % VOCABULARY


def topk(problem: Problem) -> Contender:
    if problem.spec.closed:
        raise Unavailable("it knows no closed set: `masked` does")
    return Contender("topk", lambda: _best(torch.log_softmax(problem.logits.float(), -1), problem))


def masked(problem: Problem) -> Contender:
    allowed = problem.allowed
    if allowed is None:
        raise Unavailable("nothing is masked: `topk` is the peer")

    def forward() -> tuple[Tensor, ...]:
        logits = problem.logits.float().masked_fill(~allowed(), float("-inf"))
        return _best(torch.log_softmax(logits, -1), problem)

    return Contender("masked", forward)


CONTENDERS: dict[str, Callable[[Any], Contender]] = {OURS: ours, "topk": topk, "masked": masked}

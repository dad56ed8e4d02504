"""Cases of gathered_linear and its peers: the output projection of a search in VQA's closed set of 3,129 answers.

full     F.linear over all 59,457 tokens, then the allowed ones are picked: what a mask costs before it masks.
index    for each state the allowed rows are gathered (index_select), then F.linear: the reference in the case's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.closed_sets import VOCABULARY, vqa_answers
from benchmarks.core import DTYPES, Contender, Phase, Work
from ofakern.generate import ChoiceTokens, compile_target
from ofakern.ops.gathered_linear import gathered_linear

OP = "gathered_linear"
OURS = "cpu"
PHASES = ("fwd",)
ABOUT = {"full": "F.linear over the vocabulary, then picked", "index": "index_select and F.linear, a state at a time"}
DEPTH = 768


@dataclass(frozen=True)
class Spec:
    """rows: of the step; root: all of them at the beginning of the set, else anywhere inside it."""

    name: str
    description: str
    rows: int
    root: bool
    quick: bool = False
    default: bool = True


CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("root_r16", "16 samples at the first token", 16, True, quick=True),
        Spec("inner_r80", "80 beams inside the set", 80, False, quick=True),
        Spec("inner_r640", "640 rows inside the set: a level of all-candidate scoring", 640, False),
    )
}


@dataclass
class Problem:
    """Random rows and weights; each row's state, and the tokens that states allow."""

    spec: Spec
    hidden: Tensor
    weight: Tensor
    states: Tensor
    first: Tensor
    tokens: Tensor


def make(spec: Spec, dtype: str) -> Problem:
    """Inputs drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    automaton = compile_target([ChoiceTokens(vqa_answers())], eos=2, vocabulary_size=VOCABULARY)
    tables = automaton.tables
    inner = (tables.renormalise & (tables.first.diff() > 1)).nonzero()[:, 0]
    inner = inner[inner != automaton.start]
    drawn = inner[torch.randint(len(inner), (spec.rows,), generator=generator)]
    states = torch.full((spec.rows,), automaton.start) if spec.root else drawn
    hidden = torch.randn(spec.rows, DEPTH, generator=generator).to(DTYPES[dtype])
    weight = torch.randn(VOCABULARY, DEPTH, generator=generator).mul_(DEPTH**-0.5).to(DTYPES[dtype])
    return Problem(spec, hidden, weight, states.int(), tables.first, tables.tokens)


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """2 D operations for each value; each allowed row of a state read once."""
    problem = make(spec, dtype)
    counts = problem.first.diff()
    values = int(counts[problem.states.long()].sum())
    read = int(counts[problem.states.long().unique()].sum())  # type: ignore[no-untyped-call]
    item = DTYPES[dtype].itemsize
    return Work(2.0 * DEPTH * values, float(item * DEPTH * (read + spec.rows) + 8 * values))


def verify(spec: Spec, dtype: str, harness: Any) -> None:
    """Raises AssertionError when a value is wrong."""
    problem = make(spec, dtype)
    values = ours(problem).forward()
    assert isinstance(values, Tensor)
    rows = torch.repeat_interleave(torch.arange(spec.rows), problem.first.diff()[problem.states.long()])
    tokens = _row_tokens(problem)
    hidden, weight = problem.hidden.double()[rows], problem.weight[tokens].double()
    peer = (problem.hidden[rows].float() * weight.float()).sum(1)
    size = (hidden.abs() * weight.abs()).sum(1)
    harness.assert_kept("values", values, (hidden * weight).sum(1), peer, size, torch.float32)


def _row_tokens(problem: Problem) -> Tensor:
    first = problem.first.long()
    runs = [problem.tokens[first[s] : first[s + 1]] for s in problem.states.tolist()]
    return torch.cat(runs).long()


def ours(problem: Problem) -> Contender:
    arguments = (problem.hidden, problem.weight, problem.states, problem.first, problem.tokens)
    return Contender(OURS, lambda: gathered_linear(*arguments)[0])


def index(problem: Problem) -> Contender:
    arguments = (problem.hidden, problem.weight, problem.states, problem.first, problem.tokens)
    return Contender("index", lambda: gathered_linear(*arguments, backend="reference")[0])


def full(problem: Problem) -> Contender:
    rows = torch.repeat_interleave(torch.arange(problem.spec.rows), problem.first.diff()[problem.states.long()])
    places = rows * VOCABULARY + _row_tokens(problem)

    def forward() -> Tensor:
        return F.linear(problem.hidden, problem.weight).view(-1)[places].float()

    return Contender("full", forward)


CONTENDERS: dict[str, Callable[[Any], Contender]] = {OURS: ours, "full": full, "index": index}

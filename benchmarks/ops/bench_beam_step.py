"""Cases of beam_step and its peers: a step of beam 5 over OFA's vocabulary of 59,457 entries, 10 candidates a sample.

topk     torch: log_softmax in float32, plus the rows' sums, topk over each sample's rows; masked in `r160_closed`.

`closed_3129` is a whole search through a closed set (`benchmarks/closed_search.py`), the output projection included:

masked   all logits by F.linear, behind a mask made from the automaton's tables, then log_softmax and topk.
trie     the same behind a mask that a Python loop over rows and a trie of dictionaries makes, as OFASys does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import closed_search
from benchmarks.closed_search import ClosedSearch
from benchmarks.closed_sets import VOCABULARY
from benchmarks.core import DTYPES, Contender, Phase, Unavailable, Work
from benchmarks.moved import moved
from ofakern.ops.beam_step import AutomatonTables, BeamCandidates, StepRules, beam_step

OP = "beam_step"
OURS = "cpu"
DEVICES = ("cpu", "cuda")
PHASES = ("fwd",)
ABOUT = {
    "topk": "log_softmax and topk",
    "masked": "F.linear, an automaton's mask, log_softmax and topk",
    "trie": "the same, the mask by a Python loop over a trie",
}
BEAMS = 5
WIDTH = 2 * BEAMS
PAD = 1


@dataclass(frozen=True)
class Spec:
    """rows: beams of all samples. closed: a search through a closed set instead of one step. allowed: the tokens that
    an automaton allows every row, over which the softmax is; 0: everything."""

    name: str
    description: str
    rows: int
    closed: bool = False
    quick: bool = False
    default: bool = True
    allowed: int = 0


CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("r5_v59457", "one sample, beam 5", 5),
        Spec("r80_v59457", "16 samples, beam 5", 80, quick=True),
        Spec("r160_v59457", "32 samples, beam 5", 160, default=False),
        Spec("r160_closed", "32 samples, beam 5, 3,129 tokens allowed", 160, default=False, allowed=3129),
        Spec("closed_3129", "a search in a closed set of 3,129 answers, 16 samples, beam 5", 80, closed=True),
    )
}


@dataclass
class Problem:
    spec: Spec
    logits: Tensor
    sums: Tensor
    row_offsets: Tensor
    rules: StepRules


def make(spec: Spec, dtype: str) -> Problem | ClosedSearch:
    """Inputs drawn from a fixed seed."""
    if spec.closed:
        return closed_search.record(dtype)
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(spec.rows, VOCABULARY, generator=generator) * 3).to(DTYPES[dtype])
    sums = -torch.rand(spec.rows, generator=generator) * 5
    offsets = torch.arange(0, spec.rows + 1, BEAMS, dtype=torch.int32)
    rules = StepRules(pad=PAD)
    if spec.allowed:
        tokens = 4 + torch.randperm(VOCABULARY - 4, generator=generator)[: spec.allowed].sort().values.int()
        tables = AutomatonTables(
            first=torch.tensor([0, spec.allowed], dtype=torch.int32),
            tokens=tokens,
            targets=torch.zeros_like(tokens),
            range_first=torch.zeros(2, dtype=torch.int32),
            ranges=torch.zeros((0, 3), dtype=torch.int32),
            renormalise=torch.tensor([True]),
            free=torch.tensor([False]),
        )
        rules = StepRules(states=torch.zeros(spec.rows, dtype=torch.int32), tables=tables, pad=PAD)
    return Problem(spec, logits, sums, offsets, rules)


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """Every logit that the softmax is over is read once and has one exponential."""
    if spec.closed:
        return closed_search.work(dtype)
    looked_at = spec.rows * (spec.allowed or VOCABULARY)
    return Work(0.0, float(looked_at * DTYPES[dtype].itemsize), {"exp": float(looked_at)})


def verify(spec: Spec, dtype: str, harness: Any, backend: str = "auto") -> None:
    """Raises AssertionError unless rows and tokens are the reference's and scores within two roundings."""
    problem = make(spec, dtype)
    if isinstance(problem, ClosedSearch):
        torch.testing.assert_close(closed_search.ours(problem), closed_search.exact(problem), rtol=1e-5, atol=1e-4)
        return
    there = moved(problem, "cuda") if backend == "cuda" else problem
    have = BeamCandidates(*(part.cpu() for part in _step(there, backend)))
    want = _step(problem, "reference")
    assert torch.equal(have.origins, want.origins) and torch.equal(have.tokens, want.tokens)
    torch.testing.assert_close(have.scores, want.scores, rtol=3e-7, atol=3e-7)


def _step(problem: Problem, backend: str = "auto") -> BeamCandidates:
    return beam_step(problem.logits, problem.sums, problem.row_offsets, WIDTH, problem.rules, backend=backend)


def ours(problem: Problem | ClosedSearch, backend: str = "auto") -> Contender:
    if isinstance(problem, ClosedSearch):
        if backend == "cuda":
            raise Unavailable("a search's own work is on the CPU: `r160_closed` is one of its steps")
        return _searching(OURS, lambda: closed_search.ours(problem))
    return Contender(OURS, lambda: _step(problem, backend))


def topk(problem: Problem | ClosedSearch) -> Contender:
    if isinstance(problem, ClosedSearch):
        raise Unavailable("it knows no closed set: `masked` does")
    tables = problem.rules.tables
    hidden = torch.full((VOCABULARY,), float("-inf") if tables is not None else 0.0)
    if tables is not None:
        hidden[tables.tokens.long()] = 0.0

    def forward() -> tuple[Tensor, ...]:
        logits = problem.logits.float() if tables is None else problem.logits.float() + hidden
        scores = torch.log_softmax(logits, -1)
        scores[:, PAD] = float("-inf")
        scores += problem.sums[:, None]
        best, places = scores.view(len(problem.row_offsets) - 1, -1).topk(WIDTH)
        return best, places // VOCABULARY, places % VOCABULARY

    return Contender("topk", forward)


def masked(problem: Problem | ClosedSearch) -> Contender:
    if not isinstance(problem, ClosedSearch):
        raise Unavailable("nothing is masked: `topk` is the peer")
    return _searching("masked", lambda: closed_search.masked(problem))


def trie(problem: Problem | ClosedSearch) -> Contender:
    if not isinstance(problem, ClosedSearch):
        raise Unavailable("nothing is masked: `topk` is the peer")
    root = closed_search.trie_of()
    return _searching("trie", lambda: closed_search.trie_loop(problem, root))


def _searching(name: str, forward: Callable[[], Tensor]) -> Contender:
    # Candidates that are missing differ in nothing: -inf everywhere.
    return Contender(name, forward, packed=lambda scores: scores.nan_to_num(neginf=0.0))


CONTENDERS: dict[str, Callable[[Any], Contender]] = {OURS: ours, "topk": topk, "masked": masked, "trie": trie}

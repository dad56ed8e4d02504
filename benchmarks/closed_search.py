"""A beam search through VQA's closed set of 3,129 answers, its steps from the decoder's output to the candidates.

The steps are recorded once, on random outputs: which rows are live and in which state each is. A contender then runs
all of them, projection included, so its time is that of a whole search. Samples begin with one row each, for all
contenders: a search that expands its beams at once has five times the rows at the first step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.closed_sets import VOCABULARY, vqa_answers
from benchmarks.core import DTYPES, Work
from ofakern.generate import ChoiceTokens, TokenAutomaton, compile_target
from ofakern.ops.beam_step import BeamCandidates, RaggedLogits, StepRules, beam_step
from ofakern.ops.gathered_linear import gathered_linear

DEPTH = 768
EOS, PAD = 2, 1
SAMPLES, BEAMS = 16, 5
WIDTH = 2 * BEAMS


@dataclass
class Step:
    """hidden [R, D]; sums f32 [R]; offsets int32 [B+1]; states int64 [R]; history: each row's tokens so far."""

    hidden: Tensor
    sums: Tensor
    offsets: Tensor
    states: Tensor
    history: list[list[int]]


@dataclass
class ClosedSearch:
    weight: Tensor
    automaton: TokenAutomaton
    steps: list[Step]


def record(dtype: str, samples: int = SAMPLES) -> ClosedSearch:
    """Inputs drawn from a fixed seed, and the search that follows from them."""
    generator = torch.Generator().manual_seed(1)
    automaton = compile_target([ChoiceTokens(vqa_answers())], eos=EOS, vocabulary_size=VOCABULARY)
    weight = torch.randn(VOCABULARY, DEPTH, generator=generator).mul_(DEPTH**-0.5).to(DTYPES[dtype])
    found = ClosedSearch(weight, automaton, [])
    step = Step(
        _outputs(samples, dtype, generator),
        torch.zeros(samples),
        torch.arange(samples + 1, dtype=torch.int32),
        torch.full((samples,), automaton.start),
        [[] for _ in range(samples)],
    )
    ended = [0] * samples
    while len(step.states):
        found.steps.append(step)
        step = _next(found, step, ended, _outputs(samples * BEAMS, dtype, generator))
    return found


def _outputs(rows: int, dtype: str, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, DEPTH, generator=generator).mul_(3).to(DTYPES[dtype])


def _next(search: ClosedSearch, step: Step, ended: list[int], hidden: Tensor) -> Step:
    """fairseq's beam search: the best that do not end go on; a sample is done with its last ended answer."""
    best = choose(search, step)
    rows: list[tuple[int, int, float]] = []
    counts = []
    for sample, begin in enumerate(step.offsets[:-1].tolist()):
        candidates = list(zip(*(part[sample].tolist() for part in best[:3]), strict=True))
        ended[sample] += sum(token == EOS for _, _, token in candidates)
        going = [(begin + origin, token, score) for score, origin, token in candidates if token not in (EOS, -1)]
        going = going[:BEAMS] if ended[sample] < BEAMS else []
        rows += going
        counts.append(len(going))
    origins = torch.tensor([origin for origin, _, _ in rows], dtype=torch.int64)
    tokens = torch.tensor([token for _, token, _ in rows], dtype=torch.int64)
    return Step(
        hidden[: len(rows)],
        torch.tensor([score for _, _, score in rows]),
        torch.tensor([0, *counts]).cumsum(0).int(),
        search.automaton.advance(step.states[origins], tokens),
        [[*step.history[origin], token] for origin, token, _ in rows],
    )


def choose(search: ClosedSearch, step: Step) -> BeamCandidates:
    """Ours: the logits of what may follow, and the best of them."""
    tables = search.automaton.tables
    found = gathered_linear(step.hidden, search.weight, step.states, tables.first, tables.tokens)
    return beam_step(RaggedLogits(*found, VOCABULARY), step.sums, step.offsets, WIDTH, StepRules(pad=PAD))


def work(dtype: str) -> Work:
    """2 D operations and one exponential for each token that may follow; each row of the weight read once a state."""
    search = record(dtype)
    counts = search.automaton.tables.first.diff()
    looked_at = sum(int(counts[step.states].sum()) for step in search.steps)
    read = sum(int(counts[step.states.unique()].sum()) for step in search.steps)  # type: ignore[no-untyped-call]
    return Work(2.0 * DEPTH * looked_at, float(read * DEPTH * DTYPES[dtype].itemsize), {"exp": float(looked_at)})


def ours(search: ClosedSearch) -> Tensor:
    """float32 [steps * B * width]: the candidates' scores of all steps."""
    return torch.cat([choose(search, step).scores.flatten() for step in search.steps])


def masked(search: ClosedSearch) -> Tensor:
    """All logits, behind a mask made from the automaton's tables."""
    return torch.cat(
        [_best(step.hidden, search.weight, step, search.automaton.allowed(step.states)) for step in search.steps]
    )


def exact(search: ClosedSearch) -> Tensor:
    """The scores of all steps from float64 products."""
    weight = search.weight.double()
    return torch.cat(
        [_best(step.hidden.double(), weight, step, search.automaton.allowed(step.states)) for step in search.steps]
    )


def trie_of() -> dict[int, dict]:  # type: ignore[type-arg]
    """The set as OFASys has it: dictionaries of dictionaries."""
    root: dict[int, dict] = {}  # type: ignore[type-arg]
    for answer in vqa_answers():
        node = root
        for token in (*answer, EOS):
            node = node.setdefault(token, {})
    return root


def trie_loop(search: ClosedSearch, root: dict[int, dict]) -> Tensor:  # type: ignore[type-arg]
    """All logits, behind a mask that a loop over the rows makes: OFASys's way."""
    scores = []
    for step in search.steps:
        mask = torch.zeros(len(step.states), VOCABULARY, dtype=torch.bool)
        for row, history in enumerate(step.history):
            node = root
            for token in history:
                node = node[token]
            mask[row, list(node)] = True
        scores.append(_best(step.hidden, search.weight, step, mask))
    return torch.cat(scores)


def _best(hidden: Tensor, weight: Tensor, step: Step, allowed: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float().masked_fill_(~allowed, float("-inf"))
    scores = torch.log_softmax(logits, -1).add_(step.sums[:, None])
    parts = []
    for begin, end in zip(step.offsets[:-1].tolist(), step.offsets[1:].tolist(), strict=True):
        empty = torch.full((WIDTH,), float("-inf"))
        parts.append(scores[begin:end].flatten().topk(WIDTH).values if end > begin else empty)
    return torch.cat(parts)

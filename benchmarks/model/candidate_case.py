"""`generate` / `allcand_3129`: every answer of VQA's closed set scored for every sample, everything after the encoder.

ofasys   OFA's loop: 20 answers at a time, the encoder's output repeated for each of them, the decoder over whole
         answers, all logits, a mask that was made beforehand, log_softmax. It runs on our attention, which OFA's does
         not, and for the first answers only; its time is that of all answers at the same rate.
batched  answers as rows of one decoding state, 256 at a time, whose keys of the source stand there once; all logits,
         masked. Rows leave when their answer ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.closed_sets import vqa_answers
from benchmarks.core import Contender, Work
from benchmarks.model.generate_peers import BOS
from ofakern.data.batch import Example, PackedBatch, PackedSide, Segment
from ofakern.generate import CandidateSet, ChoiceTokens, TokenAutomaton, compile_target, score_candidates
from ofakern.instruction import Modality
from ofakern.model import OFAConfig, OFAPlus, SegmentWriter
from ofakern.model.stacks import Memory

EOS, PAD = 2, 1
CHUNK, LOOP = 256, 20
_LOOPS = 3  # how often OFA's loop is timed
_SMALL = 50

Sequences = list[tuple[int, ...]]


@dataclass
class Candidates:
    """answers: without their end. The same for all contenders; scores are in their order."""

    model: OFAPlus
    answers: Sequences
    automaton: TokenAutomaton

    @classmethod
    def of(cls, model: OFAPlus, small: bool) -> Candidates:
        size = model.config.vocab_size
        answers = list(vqa_answers(_SMALL if small else 3129))
        if small:
            answers = list(dict.fromkeys(tuple(4 + token % (size - 4) for token in answer) for answer in answers))
        automaton = compile_target([ChoiceTokens(tuple(answers))], eos=EOS, vocabulary_size=size)
        return cls(model, answers, automaton)


def ours(case: Candidates, memory: Memory) -> Tensor:
    writer = SegmentWriter(case.model, "text", Modality.TEXT)
    return score_candidates(writer, memory, memory.samples, case.answers)


@torch.inference_mode()
def batched(case: Candidates, memory: Memory) -> Tensor:
    parts = [_chunk(case, memory, case.answers[n : n + CHUNK]) for n in range(0, len(case.answers), CHUNK)]
    return torch.cat(parts, 1)


def _chunk(case: Candidates, memory: Memory, answers: Sequences) -> Tensor:
    """float32 [B, n]."""
    samples, count = memory.samples, len(answers)
    writer = SegmentWriter(case.model, "text", Modality.TEXT)
    longest = max(map(len, answers)) + 1
    tokens = torch.tensor([[*answer, EOS] + [PAD] * (longest - 1 - len(answer)) for answer in answers])
    tokens = tokens.repeat(samples, 1)
    state = writer.begin_decode(memory, count, longest)  # type: ignore[arg-type]
    live = torch.arange(samples * count)
    scores, at = torch.zeros(samples * count), torch.full((samples * count,), case.automaton.start)
    fed = torch.full((samples * count,), BOS)
    for place in range(longest):
        logits = writer.decode_step(state, fed).float()
        lprobs = logits.masked_fill_(~case.automaton.allowed(at), float("-inf")).log_softmax(1)
        token = tokens[live, place]
        scores[live] += lprobs.gather(1, token[:, None])[:, 0]
        keep = (token != EOS).nonzero()[:, 0]
        state.reorder(keep)
        live, fed, at = live[keep], token[keep], case.automaton.advance(at[keep], token[keep])
    return scores.view(samples, count)


@dataclass
class Loop:
    """What OFA makes before its loop: batches of answers and the masks of their places."""

    sides: list[PackedSide]
    labels: list[Tensor]
    blocked: list[Tensor]
    lengths: list[list[int]]


@torch.inference_mode()
def loop_of(case: Candidates, samples: int, loops: int) -> Loop:
    found = Loop([], [], [], [])
    for begin in range(0, min(loops * LOOP, len(case.answers)), LOOP):
        answers = case.answers[begin : begin + LOOP]
        every = [answer for _ in range(samples) for answer in answers]
        found.sides.append(PackedBatch.collate([_example(answer) for answer in every]).target)
        found.labels.append(torch.tensor([token for answer in every for token in (*answer, EOS)]))
        found.lengths.append([len(answer) + 1 for answer in every])
        states = torch.cat([_states(case.automaton, answer) for answer in every])
        found.blocked.append(~case.automaton.allowed(states))
    return found


def _example(answer: Sequence[int]) -> Example:
    source = [Segment(0, "text", Modality.TEXT, torch.tensor([BOS]))]
    target = [Segment(1, "text", Modality.TEXT, torch.tensor([BOS, *answer]))]
    return Example(source, target, torch.tensor([*answer, EOS]))


def _states(automaton: TokenAutomaton, answer: Sequence[int]) -> Tensor:
    states = [torch.tensor([automaton.start])]
    for token in answer:
        states.append(automaton.advance(states[-1], torch.tensor([token])))
    return torch.cat(states)


@torch.inference_mode()
def ofa_loop(case: Candidates, memory: Memory, loop: Loop) -> Tensor:
    """float32 [B, n], of the answers of `loop`."""
    parts = []
    for side, labels, blocked, lengths in zip(loop.sides, loop.labels, loop.blocked, loop.lengths, strict=True):
        each = len(lengths) // memory.samples
        hidden = case.model.decode(side, _repeated(memory, each))
        lprobs = case.model.logits(hidden).float().masked_fill_(blocked, float("-inf")).log_softmax(1)
        own = lprobs.gather(1, labels[:, None])[:, 0].split(lengths)
        parts.append(torch.stack([part.sum() for part in own]).view(memory.samples, each))
    return torch.cat(parts, 1)


def _repeated(memory: Memory, times: int) -> Memory:
    """Every sample `times` times, as OFA repeats the encoder's output for the answers of a batch."""
    lengths = list(memory.lengths)

    def repeat(x: Tensor) -> Tensor:
        return torch.cat([part for one in x.split(lengths) for part in [one] * times])

    counts = tuple(length for length in lengths for _ in range(times))
    return Memory(repeat(memory.states), repeat(memory.positions), counts)


def every(case: Candidates, memory: Memory) -> list[Tensor]:
    """The scores by each contender, all answers."""
    loop = loop_of(case, memory.samples, len(case.answers))
    return [ours(case, memory), batched(case, memory), ofa_loop(case, memory, loop)]


def contender(name: str, case: Candidates, memory: Memory) -> Contender:
    """Its phase is `decode`: the encoder has run."""
    if name == "batched":
        return _contender(name, lambda: batched(case, memory))
    if name == "ofasys":
        loop = loop_of(case, memory.samples, _LOOPS)
        share = min(_LOOPS * LOOP, len(case.answers)) / len(case.answers)
        return _contender(name, lambda: ofa_loop(case, memory, loop), share)
    return _contender(name, lambda: ours(case, memory))


def _contender(name: str, call: Callable[[], Tensor], share: float = 1.0) -> Contender:
    return Contender(name, call, steps={"decode": call}, share=share)


def ops(config: OFAConfig, samples: int, keys: int, item: int) -> list[Work]:
    """The least: a row for each prefix that leaves a choice, and the weight rows of what may follow."""
    dim, layers = config.dim, config.decoder_layers
    shapes = [(3 * dim, dim), (dim, dim), (dim, dim), (dim, dim), (config.ffn_dim, dim), (dim, config.ffn_dim)]
    found = [_linear(samples * keys, 2 * dim, dim, item)] * layers
    for number, (rows, edges) in enumerate(_levels(config.vocab_size), 1):
        rows *= samples
        attend = [
            Work(4.0 * rows * most * dim, float(2 * item * read * dim))
            for most, read in ((number, rows), (keys, samples * keys))
        ]
        found += [*(_linear(rows, n, k, item) for n, k in shapes), *attend] * layers
        found.append(Work(2.0 * samples * edges * dim, float(item * edges * dim)))
    return found


def _linear(m: int, n: int, k: int, item: int) -> Work:
    return Work(2.0 * m * n * k, float(item * (m * k + n * k + m * n)))


def _levels(vocabulary: int) -> list[tuple[int, int]]:
    """Rows and tokens that may follow them, a level of the set at a time."""
    automaton = compile_target([ChoiceTokens(vqa_answers())], eos=EOS, vocabulary_size=vocabulary)
    candidates, states, found = CandidateSet(automaton), np.array([automaton.start]), []
    while len(states):
        _, edges = candidates.transitions(states)
        found.append((len(states), len(edges)))
        targets = candidates.targets[edges]
        states = targets[~candidates.decided[targets]]
    return found

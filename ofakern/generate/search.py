"""Greedy search, beam search and sampling over the model's opaque decode state, vectorised over the batch.

The model is seen through three calls only: `begin_decode(memory, rows_per_sample, max_length)`,
`decode_step(state, tokens [rows]) -> logits [rows, V]` and `state.reorder(index [rows])`. Rows of one sample stand
together. The beam search is fairseq's, which OFA and OFASys use: 2 x beams candidates per step, an answer ends only
from within the best beams, a sample is done with its num_beams-th answer. The bookkeeping stays on the CPU, wherever
the model is; only the step's logits come over. `compat="ofasys"` restores two habits of
OFASys that are wrong: a forced prefix that a beam may leave, and a length limit that counts the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.generate.automaton import TokenAutomaton
from ofakern.generate.config import GenerationConfig
from ofakern.generate.scoring import NEVER, SpecialTokens, StepScorer


class DecodeState(Protocol):
    """The model's key/value cache; its layout is the model's own."""

    def reorder(self, index: Tensor) -> None: ...


class StepDecoder(Protocol):
    """What a search needs of a model."""

    def begin_decode(self, memory: Any, rows_per_sample: int, max_length: int) -> Any: ...

    def decode_step(self, state: Any, tokens: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Hypothesis:
    """One answer.

    Attributes:
        tokens: vocabulary ids without the start token, with the end of sequence.
        score: sum of `token_scores` / len(tokens) ** length_penalty.
        token_scores: each token's log-probability as the search saw it.
    """

    tokens: tuple[int, ...]
    score: float
    token_scores: tuple[float, ...]


@torch.inference_mode()
def generate(
    model: StepDecoder,
    memory: Any,
    batch_size: int,
    config: GenerationConfig,
    *,
    automaton: TokenAutomaton | None = None,
    prefix: Tensor | None = None,
    special: SpecialTokens | None = None,
    max_positions: int | None = None,
) -> list[list[Hypothesis]]:
    """For each of `batch_size` samples its `config.num_return_sequences` best answers, best first.

    Args:
        memory: what `model.encode` returned for these samples.
        automaton: what a target may look like; None leaves every token allowed, as OFASys does.
        prefix: int64 [B, P] forced first tokens, padded with `special.pad` behind.
        max_positions: most tokens the decoder takes, start token included.

    Raises:
        OfakernValueError: the answers cannot fit into `max_positions`, or a prefix of another batch size.
    """
    if prefix is not None and (prefix.dim() != 2 or len(prefix) != batch_size):
        raise OfakernValueError(f"generate: prefix must be [{batch_size}, P], got {list(prefix.shape)}")
    closed = automaton is not None and bool(automaton.renormalise[automaton.start])
    config = config.resolved(closed=closed)
    special = special or SpecialTokens()
    if batch_size == 0:
        return []
    rows = config.num_return_sequences if config.do_sample else config.num_beams
    assert rows is not None  # resolved() leaves no None
    scorer = StepScorer(config, special, automaton, prefix, batch_size, rows, max_positions)
    state = model.begin_decode(memory, rows, scorer.max_length + 1)
    if config.do_sample or rows == 1:
        return _single_path(model, state, scorer, config, special, batch_size, rows)
    return _BeamSearch(model, state, scorer, config, special, batch_size, rows).run()


def _single_path(
    model: StepDecoder,
    state: Any,
    scorer: StepScorer,
    config: GenerationConfig,
    special: SpecialTokens,
    batch_size: int,
    rows: int,
) -> list[list[Hypothesis]]:
    """Greedy search (one row per sample) or independent draws: no row ever changes place."""
    random = torch.Generator().manual_seed(config.seed)
    total = batch_size * rows
    tokens = torch.full((total, scorer.max_length + 2), special.pad)
    tokens[:, 0] = special.bos
    scores = torch.zeros(total, scorer.max_length + 1)
    lengths = torch.full((total,), scorer.max_length + 1)
    done = torch.zeros(total, dtype=torch.bool)
    states = scorer.initial_states()
    for step in range(scorer.max_length + 1):
        logits = model.decode_step(state, tokens[:, step]).cpu()
        lprobs = scorer(logits, tokens[:, : step + 1], states, step)
        chosen = _draw(lprobs, config, random) if config.do_sample else lprobs.argmax(-1)
        chosen = torch.where(done, special.eos, chosen)
        tokens[:, step + 1] = chosen
        scores[:, step] = lprobs.gather(1, chosen[:, None])[:, 0]
        states = scorer.advance(states, chosen, step)
        lengths = torch.where(~done & (chosen == special.eos), step + 1, lengths)
        done |= chosen == special.eos
        if bool(done.all()):
            break
    found = [_hypothesis(tokens[r, 1:], scores[r], int(lengths[r]), config.length_penalty) for r in range(total)]
    grouped = [found[i * rows : (i + 1) * rows] for i in range(batch_size)]
    return [sorted(group, key=lambda answer: -answer.score) for group in grouped]


def _draw(lprobs: Tensor, config: GenerationConfig, random: torch.Generator) -> Tensor:
    """int64 [rows] drawn from the top_k / top_p part of [rows, V]."""
    ordered, ids = lprobs.sort(-1, descending=True)
    if config.top_k:
        ordered = ordered[:, : config.top_k]
    probabilities = torch.softmax(ordered, -1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= config.top_p, 0.0)
    return ids.gather(1, torch.multinomial(probabilities, 1, generator=random))[:, 0]


def _hypothesis(tokens: Tensor, scores: Tensor, length: int, penalty: float) -> Hypothesis:
    kept = scores[:length]
    score = float(kept.sum()) / length**penalty
    return Hypothesis(tuple(tokens[:length].tolist()), score, tuple(kept.tolist()))


class _BeamSearch:
    def __init__(
        self,
        model: StepDecoder,
        state: Any,
        scorer: StepScorer,
        config: GenerationConfig,
        special: SpecialTokens,
        batch_size: int,
        beams: int,
    ) -> None:
        self._model, self._state, self._scorer = model, state, scorer
        self._config, self._special = config, special
        self._beams = beams
        self._first_row = torch.arange(batch_size)[:, None] * beams
        length = scorer.max_length + 1
        self._tokens = torch.full((batch_size, beams, length + 1), special.pad)
        self._tokens[:, :, 0] = special.bos
        self._sums = torch.zeros(batch_size, beams, length)  # cumulative log-probabilities
        self._live = torch.ones(batch_size, beams, dtype=torch.bool)
        self._states = scorer.initial_states()
        self._finished: list[list[Hypothesis]] = [[] for _ in range(batch_size)]
        self._done = [False] * batch_size

    def run(self) -> list[list[Hypothesis]]:
        wanted = self._config.num_return_sequences
        for step in range(self._scorer.max_length + 1):
            self._step(step)
            self._done = [done or self._is_done(sample, step) for sample, done in enumerate(self._done)]
            if all(self._done):
                break
        # sorted() is stable: equal scores keep the order in which they were found.
        return [sorted(found, key=lambda answer: -answer.score)[:wanted] for found in self._finished]

    def _step(self, step: int) -> None:
        batch, beams = self._live.shape
        history = self._tokens[:, :, : step + 1].reshape(batch * beams, step + 1)
        logits = self._model.decode_step(self._state, history[:, step]).cpu()
        lprobs = self._scorer(logits, history, self._states, step).view(batch, beams, -1)
        vocabulary = lprobs.shape[-1]
        if step == 0:
            lprobs = lprobs[:, :1].contiguous()  # all beams are still the same
        else:
            lprobs += torch.where(self._live, self._sums[:, :, step - 1], NEVER)[:, :, None]
        flat = lprobs.view(batch, -1)
        scores, places = flat.topk(min(2 * beams, flat.shape[1] - 1), dim=1)
        origins, tokens = places // vocabulary, places % vocabulary
        ends = (tokens == self._special.eos) & (scores > NEVER)
        self._finish(ends[:, :beams], scores, origins, step)
        self._continue(ends, scores, origins, tokens, step)

    def _finish(self, ends: Tensor, scores: Tensor, origins: Tensor, step: int) -> None:
        """Take the answers that end within the best beams, in the order of their scores."""
        for sample, place in ends.nonzero().tolist():
            found = self._finished[sample]
            if self._done[sample] or (self._config.early_stopping and len(found) >= self._beams):
                continue
            origin = int(origins[sample, place])
            sums = self._sums[sample, origin, : step + 1].clone()
            sums[step] = scores[sample, place]
            each = torch.cat((sums[:1], sums.diff()))
            tokens = (*self._tokens[sample, origin, 1 : step + 1].tolist(), self._special.eos)
            score = float(sums[step]) / (step + 1) ** self._config.length_penalty
            found.append(Hypothesis(tokens, score, tuple(each.tolist())))

    def _continue(self, ends: Tensor, scores: Tensor, origins: Tensor, tokens: Tensor, step: int) -> None:
        """Move the best candidates that do not end into the beams."""
        batch, beams = self._live.shape
        width = scores.shape[1]
        order = torch.where(ends, width, 0) + torch.arange(width)
        kept = order.argsort(1)[:, :beams]
        if width < beams:  # a vocabulary smaller than the beams: the last beams stay empty
            kept = torch.cat((kept, kept[:, :1].expand(batch, beams - width)), 1)
        live = ~ends.gather(1, kept) & (scores.gather(1, kept) > NEVER)
        live[:, width:] = False
        origin = origins.gather(1, kept)
        chosen = tokens.gather(1, kept)
        rows = (self._first_row + origin).view(-1)
        self._tokens = self._tokens.view(batch * beams, -1)[rows].view(batch, beams, -1)
        self._tokens[:, :, step + 1] = chosen
        self._sums = self._sums.view(batch * beams, -1)[rows].view(batch, beams, -1)
        self._sums[:, :, step] = scores.gather(1, kept)
        self._states = self._scorer.advance(self._states[rows], chosen.view(-1), step)
        self._live = live
        self._state.reorder(rows)

    def _is_done(self, sample: int, step: int) -> bool:
        live = self._live[sample]
        if not bool(live.any()):
            return True
        found = self._finished[sample]
        if len(found) < self._beams:
            return False
        if self._config.early_stopping:
            return True
        # A sum only falls; dividing by the longest length possible gives the best any beam can still reach.
        best = float(self._sums[sample, :, step][live].max())
        longest = self._scorer.max_length + 1
        power = self._config.length_penalty
        bound: float = best / (longest if power > 0 else step + 2) ** power
        worst = sorted((answer.score for answer in found), reverse=True)[self._beams - 1]
        return bound <= worst

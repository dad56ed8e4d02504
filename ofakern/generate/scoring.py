"""From a step's logits to log-probabilities of the tokens that may follow: the part all searches share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ofakern.errors import OfakernRuntimeError, OfakernValueError
from ofakern.generate.automaton import TokenAutomaton
from ofakern.generate.config import GenerationConfig

NEVER = float("-inf")


@dataclass(frozen=True)
class SpecialTokens:
    """Vocabulary ids of the special tokens."""

    bos: int = 0
    pad: int = 1
    eos: int = 2
    unk: int = 3


class StepScorer:
    """Log-probabilities of one search step; holds what differs from sample to sample.

    Args:
        prefix: int64 [B, P], each sample's forced first tokens, `special.pad` behind a shorter one; None for none.
        rows_per_sample: rows the search keeps for each sample, consecutive.
    """

    def __init__(
        self,
        config: GenerationConfig,
        special: SpecialTokens,
        automaton: TokenAutomaton | None,
        prefix: Tensor | None,
        batch_size: int,
        rows_per_sample: int,
        max_positions: int | None = None,
    ) -> None:
        self._config = config
        self._special = special
        self._automaton = automaton
        if prefix is None:
            prefix = torch.zeros(batch_size, 0, dtype=torch.int64)
        self._prefix = prefix.repeat_interleave(rows_per_sample, 0)
        self._prefix_lengths = (self._prefix != special.pad).sum(1)
        # OFASys counts the forced prefix as part of the length.
        forced = torch.zeros_like(self._prefix_lengths) if config.compat == "ofasys" else self._prefix_lengths
        longest = None if automaton is None else automaton.longest
        needed = self._prefix_lengths + (longest or 0)
        self._limits = forced + config.max_new_tokens if longest is None else needed
        if max_positions is not None:
            self._check_positions(needed, max_positions - 1)
            self._limits = self._limits.clamp(max=max_positions - 1)
        self.max_length = int(self._limits.max())

    @staticmethod
    def _check_positions(needed: Tensor, room: int) -> None:
        longest = int(needed.max())
        if longest > room:
            raise OfakernValueError(
                f"generate: forced and fixed target tokens must fit the decoder's positions ({room}), got {longest}"
            )

    def initial_states(self) -> Tensor:
        """int64 [rows]: the automaton's state of every row before the first token."""
        start = 0 if self._automaton is None else self._automaton.start
        return torch.full((len(self._prefix),), start, dtype=torch.int64)

    def advance(self, states: Tensor, tokens: Tensor, step: int) -> Tensor:
        """int64 [rows]: the states after `tokens`, the tokens of `step`; the prefix does not move them."""
        if self._automaton is None:
            return states
        return torch.where(step < self._prefix_lengths, states, self._automaton.advance(states, tokens))

    def __call__(self, logits: Tensor, history: Tensor, states: Tensor, step: int) -> Tensor:
        """float32 [rows, V] log-probabilities; -inf where a token may not stand.

        Args:
            logits: [rows, V] of the model.
            history: int64 [rows, step + 1], the tokens so far, beginning with the start token.
            states: int64 [rows] of the automaton.
        """
        logits = logits.float()
        if self._config.temperature != 1.0:
            logits = logits / self._config.temperature
        in_prefix = step < self._prefix_lengths
        at_end = step >= self._limits
        if self._automaton is None:
            scores = log_probabilities(logits, step)
            free = torch.ones(len(logits), dtype=torch.bool)
        else:
            scores = self._constrained(self._automaton, logits, states, step)
            free = self._automaton.free[states]
        scores[:, self._special.pad] = NEVER
        scores[:, self._special.unk] -= self._config.unk_penalty
        self._bound_length(scores, free & ~in_prefix, at_end, step)
        forced = in_prefix & ~at_end
        if bool(forced.any()):
            scores = self._force_prefix(scores, forced, step)
        size = self._config.no_repeat_ngram_size
        if size:
            # fairseq, and so OFASys, count the start token among the n-grams: it matters where `<s>` is generated.
            skip = self._prefix_lengths if self._config.compat is None else torch.full_like(self._prefix_lengths, -1)
            ban_repeated_ngrams(scores, history, skip, free & ~in_prefix & ~at_end, size)
        return scores

    def _constrained(self, automaton: TokenAutomaton, logits: Tensor, states: Tensor, step: int) -> Tensor:
        in_prefix = step < self._prefix_lengths
        blocked = ~automaton.allowed(states)
        blocked &= ~in_prefix[:, None]
        # At the length limit the end of sequence is forced, whatever the automaton still expects.
        blocked[:, self._special.eos] &= step < self._limits
        renormalise = automaton.renormalise[states] & ~in_prefix
        if bool(renormalise.any()):
            logits = logits.masked_fill(blocked & renormalise[:, None], NEVER)
        return log_probabilities(logits, step).masked_fill_(blocked, NEVER)

    def _bound_length(self, scores: Tensor, free: Tensor, at_end: Tensor, step: int) -> None:
        eos = self._special.eos
        counted = step if self._config.compat == "ofasys" else step - self._prefix_lengths
        early = free & (counted < self._config.min_new_tokens) & ~at_end
        end_scores = torch.where(early, NEVER, scores[:, eos])
        if bool(at_end.any()):
            scores.masked_fill_(at_end[:, None], NEVER)
        scores[:, eos] = end_scores

    def _force_prefix(self, scores: Tensor, rows: Tensor, step: int) -> Tensor:
        token = torch.where(rows, self._prefix[:, step], 0)
        wanted = scores.gather(1, token[:, None])
        others = NEVER
        if self._config.compat == "ofasys" and self._automaton is None:
            # fairseq's prefix forcing leaves every other token one below the worst prefix token of the batch.
            others = float(wanted[rows].min()) - 1
        forced = torch.full_like(scores, others).scatter_(1, token[:, None], wanted)
        return torch.where(rows[:, None], forced, scores)


def log_probabilities(logits: Tensor, step: int) -> Tensor:
    """log_softmax of [rows, V]; OfakernRuntimeError when it is not a number."""
    scores = torch.log_softmax(logits, -1)
    if bool(scores[:, 0].isnan().any()):  # one NaN (or infinity) makes the whole row NaN
        raise OfakernRuntimeError(f"generate: logits must be finite, got NaN at step {step}")
    return scores


def ban_repeated_ngrams(scores: Tensor, history: Tensor, skip: Tensor, rows: Tensor, size: int) -> None:
    """Set to -inf, in place, the tokens that would repeat an n-gram of `size` already generated.

    Args:
        scores: [rows, V].
        history: int64 [rows, t], beginning with the start token.
        skip: int64 [rows], tokens after the start token that do not count (the forced prefix); -1: even the start
            token counts.
        rows: bool [rows], where to look at all.
    """
    length = history.shape[1]
    if length < size:
        return
    grams = history.unfold(1, size, 1)  # [rows, t - size + 1, size]
    tail = history[:, length - size + 1 :]
    same = (grams[:, :, : size - 1] == tail[:, None, :]).all(-1)
    begins = torch.arange(grams.shape[1])
    same &= (begins >= 1 + skip[:, None]) & rows[:, None]
    row, place = same.nonzero(as_tuple=True)
    scores[row, grams[row, place, size - 1]] = NEVER

"""What a step is told beside its logits: plain tensors, one entry per row, so that requests of any kind mix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ofakern.errors import OfakernRuntimeError


class InvalidLogitsError(OfakernRuntimeError):
    """A live row holds NaN or infinity, or nothing but -inf. row: the first such row of the call."""

    def __init__(self, where: str, name: str, row: int) -> None:
        super().__init__(f"{where}: {name} must be finite (or -inf, but not all), got another value in row {row}")
        self.row = row


@dataclass(frozen=True)
class AutomatonTables:
    """What a target may look like: the states of a finite automaton over token ids.

    State s allows the explicit tokens `tokens[first[s]:first[s + 1]]` and the ids lo <= id < hi of
    `ranges[range_first[s]:range_first[s + 1]]`; an explicit token may stand inside a range.

    Attributes:
        first: int32 [S+1]. tokens, targets: int32 [E], ascending inside a state; targets: the state that follows.
        range_first: int32 [S+1]. ranges: int32 [Q,3], (lo, hi, target), disjoint inside a state.
        renormalise: bool [S]; the probabilities of such a state are taken over what it allows only.
        free: bool [S]; free text, where n-grams may be blocked and a least length holds.
    """

    first: Tensor
    tokens: Tensor
    targets: Tensor
    range_first: Tensor
    ranges: Tensor
    renormalise: Tensor
    free: Tensor


@dataclass(frozen=True)
class StepRules:
    """What may follow in each of R rows, and at which price. None leaves a rule out.

    Attributes:
        temperature: float32 [R], above 0; logits are multiplied by 1 / temperature.
        live: bool [R]; other rows are not looked at.
        forced: int32 [R]; the only token that may follow, with its own log-probability; -1: none.
        no_eos: bool [R]; the end of sequence may not follow yet. In free states, where nothing is forced.
        repetition_penalty: float32 [R]; the logit of every token of `history` is divided by it when positive and
            multiplied when negative, before temperature and softmax.
        history: int32 [R,t], the tokens so far; the last column is the newest. Ids outside the vocabulary are ignored.
        counted_from: int32 [R]; the first column of `history` that counts, 0 without it.
        ngram: int32 [R]; no n-gram of this size is generated twice; 0: none. In free states, where nothing is forced.
        unk_penalty: float32 [R]; subtracted from the unknown token's log-probability.
        adjust_first, adjust_tokens, adjust_values: int32 [R+1], int32 [n], float32 [n]; `adjust_values` is added to
            the log-probability of row r's tokens `adjust_tokens[adjust_first[r]:adjust_first[r + 1]]`, not where one
            is forced; -inf bans.
        states: int32 [R], the state of each row in `tables`; -1: everything is allowed.
        tables: the automaton.
        pad, eos, unk: vocabulary ids, -1 for none. The padding token never follows.

    Source of the repetition penalty: Keskar et al., CTRL, arXiv 1909.05858, with the sign rule of transformers.
    """

    temperature: Tensor | None = None
    live: Tensor | None = None
    forced: Tensor | None = None
    no_eos: Tensor | None = None
    repetition_penalty: Tensor | None = None
    history: Tensor | None = None
    counted_from: Tensor | None = None
    ngram: Tensor | None = None
    unk_penalty: Tensor | None = None
    adjust_first: Tensor | None = None
    adjust_tokens: Tensor | None = None
    adjust_values: Tensor | None = None
    states: Tensor | None = None
    tables: AutomatonTables | None = None
    pad: int = 1
    eos: int = 2
    unk: int = 3


class RaggedLogits(NamedTuple):
    """Logits of a few tokens of each row: nothing else may follow, and the softmax is over them.

    Attributes:
        values: [n] float32, bfloat16 or float16. tokens: int32 [n], ascending inside a row.
        first: int32 [R+1]; row r has the entries first[r]:first[r + 1].
        vocabulary: all ids are below it.
    """

    values: Tensor
    first: Tensor
    tokens: Tensor
    vocabulary: int


class BeamCandidates(NamedTuple):
    """The best continuations of each sample, best first; equal scores: smaller row, then smaller token.

    Attributes:
        scores: float32 [B,width], sum of the row + log_probs.
        origins: int32 [B,width], the row inside its sample.
        tokens: int32 [B,width].
        log_probs: float32 [B,width], this step's own part.

    Where a sample has fewer candidates the rest is -inf, 0, -1 and -inf.
    """

    scores: Tensor
    origins: Tensor
    tokens: Tensor
    log_probs: Tensor

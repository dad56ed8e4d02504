"""What goes into a search and what comes out of it, and what it needs of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ofakern.generate.automaton import TokenAutomaton
from ofakern.generate.config import GenerationConfig

__all__ = ["DecodeState", "Finished", "Hypothesis", "SearchRequest", "SpecialTokens", "StepDecoder", "TokenEvent"]


@dataclass(frozen=True)
class SpecialTokens:
    """Vocabulary ids of the special tokens."""

    bos: int = 0
    pad: int = 1
    eos: int = 2
    unk: int = 3


class DecodeState(Protocol):
    """The model's key/value cache; its layout is the model's own. States with `join(other)` are joined."""

    def reorder(self, index: Tensor) -> None: ...


class StepDecoder(Protocol):
    """What a search needs of a model.

    One that also has `decode_hidden(state, tokens) -> [rows, D]`, `step_logits(state, hidden, ids=None)` (those of the
    ids lo <= id < hi only) and `output_weight [V, D]` lets closed sets and ranges compute the logits they need only.
    """

    def begin_decode(self, memory: Any, rows_per_sample: Any, max_length: int) -> Any:
        """A state for `rows_per_sample` (a count, or one for each sample) rows of each of the memory's samples."""
        ...

    def decode_step(self, state: Any, tokens: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Hypothesis:
    """One answer.

    Attributes:
        tokens: vocabulary ids without the start token, with the end of sequence. Without it where every continuation
            was forbidden.
        score: sum of `token_scores` / len(tokens) ** length_penalty.
        token_scores: each token's log-probability as the search saw it, the penalties of diverse groups included.
    """

    tokens: tuple[int, ...]
    score: float
    token_scores: tuple[float, ...]


@dataclass(frozen=True)
class TokenEvent:
    """A token that is certain to stand in an answer.

    Attributes:
        id: of the request.
        sequence: 0, or the number of the draw where several are drawn (in the order of drawing, not of scores).
        step: the token's place in the answer, counted from the end of the forced prefix.
        token: vocabulary id; the end of sequence comes too. log_prob: as in `Hypothesis.token_scores`.
    """

    id: int
    sequence: int
    step: int
    token: int
    log_prob: float


@dataclass(frozen=True)
class Finished:
    """A request's end: its best answers, best first, or the `error` that ended it (only it)."""

    id: int
    answers: list[Hypothesis]
    error: Exception | None = None


@dataclass(frozen=True)
class SearchRequest:
    """One sample's search.

    Attributes:
        config: its settings; requests with different ones run together.
        automaton: what the target may look like; None leaves every token allowed, as OFASys does.
        prefix: the forced first tokens, without the start token.
        max_positions: most tokens the decoder takes, start token included.
        on_token: gets every `TokenEvent`, in order. What it raises ends this request alone.
        stream: `SearchSession.step` returns the `TokenEvent`s.
    """

    config: GenerationConfig = field(default_factory=GenerationConfig)
    automaton: TokenAutomaton | None = None
    prefix: Sequence[int] = ()
    max_positions: int | None = None
    on_token: Callable[[TokenEvent], object] | None = None
    stream: bool = False

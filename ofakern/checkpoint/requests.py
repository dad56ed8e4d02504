"""An instruction and a row as a search's request, and the answers back as `Output`s."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ofakern.checkpoint.answers import TargetReader
from ofakern.checkpoint.known_task import KnownTask
from ofakern.data.batch import Example
from ofakern.data.example import IMAGES, Encoder
from ofakern.errors import DataError, OfakernValueError
from ofakern.generate import GenerationConfig, Hypothesis, SearchRequest, TokenAutomaton, TokenEvent
from ofakern.instruction import Modality
from ofakern.modality.output import Output
from ofakern.plan import Plan

__all__ = ["PreparedRequest", "Recipe", "StreamPiece", "prefix_of", "requested"]

Row = Mapping[str, Any]
Answer = Output | list[Output]


@dataclass(frozen=True)
class StreamPiece:
    """One certain token of an answer that is being written.

    Attributes:
        row: number of the request. sequence: 0, or the number of the draw where several are drawn.
        slot: name of the target slot it belongs to; None at the end and in text between the slots.
        text: what it adds to the slot's text; "" where it adds none yet (half a character) or the slot has none.
        token: vocabulary id. log_prob: as the search saw it.
    """

    row: int
    sequence: int
    slot: str | None
    text: str
    token: int
    log_prob: float


@dataclass(frozen=True)
class Recipe:
    """How the rows of one instruction are answered: everything about it that no row changes.

    Attributes:
        hidden: columns that are answers, which rows may bring along and nobody looks at.
        automaton: what the target may look like; None where it is another one for each row.
        positions: most tokens the decoder takes.
    """

    known: KnownTask
    encoder: Encoder
    reader: TargetReader
    hidden: frozenset[str]
    automaton: TokenAutomaton | None
    positions: int

    @property
    def plan(self) -> Plan:
        return self.known.plans[0]

    @property
    def made(self) -> Modality:
        """What the target begins with: speech and motions are not searched for."""
        return self.plan.target[0].modality

    def prepare(
        self,
        row: Row,
        number: int,
        config: GenerationConfig,
        on_token: Callable[[TokenEvent], object] | None = None,
        *,
        stream: bool = False,
        tell: Callable[[StreamPiece], object] | None = None,
        keep_images: bool = True,
    ) -> PreparedRequest:
        """Encode one row. on_token, stream: of the `SearchRequest`; tell: is called with `StreamPiece`s instead.

        Raises DataError, which names row `number`, for one that cannot be used; OfakernValueError when an answer that
        is not searched for should be streamed.
        """
        if not isinstance(row, Mapping):
            raise DataError(f"inference: row {number} must be a mapping of columns, got {type(row).__name__}")
        example = self.encoder({name: value for name, value in row.items() if name not in self.hidden}, number)
        if not keep_images:
            example.columns.pop(IMAGES, None)
        if self.made in (Modality.AUDIO, Modality.MOTION):
            if stream or on_token or tell:
                raise OfakernValueError(f"inference: streamed targets must be tokens, got {self.made.name}")
            return PreparedRequest(self, example, config, None, None)
        automaton = self.automaton or self.reader.automaton(row)
        if config.all_candidates:
            if stream or on_token or tell:
                raise OfakernValueError("inference: all_candidates must not be streamed, got a listener")
            return PreparedRequest(self, example, config, None, automaton)
        if tell is not None:
            on_token = _PieceTeller(number, self.reader, automaton, tell)
        searched, constrained = config, True
        if config.compat == "ofasys":
            searched, constrained = self.reader.as_ofasys(config)
            if self.reader.codes_only:  # OFASys takes their probabilities over the whole vocabulary
                automaton = automaton.unnormalised()
        request = SearchRequest(
            searched,
            automaton if constrained else None,
            prefix_of(example),
            self.positions,
            on_token,
            stream,
        )
        return PreparedRequest(self, example, config, request, automaton)


@dataclass(frozen=True)
class PreparedRequest:
    """A row that is ready to be answered.

    Attributes:
        search: what a `SearchSession` takes; None for speech, motions and where all candidates are scored, which
            `GeneralistModel.run_request` does.
        automaton: of the target, also where the search is not bound to it.
    """

    recipe: Recipe
    example: Example
    config: GenerationConfig
    search: SearchRequest | None
    automaton: TokenAutomaton | None = field(repr=False)

    @property
    def writer_key(self) -> tuple[str, int]:
        """Adaptor and modality of the target's segment: requests with the same key share a writer."""
        target = self.example.target[0]
        return target.adaptor, int(target.modality)

    def read(self, answers: Sequence[Hypothesis]) -> Answer:
        """What `inference` returns for these answers: an `Output`, or a list of them for several."""
        assert self.automaton is not None
        reader, example = self.recipe.reader, self.example
        outputs = [reader.read(one, example.prefix_length, self.automaton, example.columns) for one in answers]
        return outputs if self.config.num_return_sequences > 1 else outputs[0]

    def partial_text(self, tokens: Sequence[int]) -> str:
        """The text of the slot that the last of `tokens` (without the forced prefix) belongs to, as far as it goes."""
        return self.partial(tokens)[1]

    def partial(self, tokens: Sequence[int]) -> tuple[str | None, str]:
        """That slot's name (None at the end and between slots) and its text so far."""
        assert self.automaton is not None
        return self.recipe.reader.partial(tokens, self.automaton)


def prefix_of(example: Example) -> tuple[int, ...]:
    """The forced first tokens of an answer, without the start token."""
    return tuple(example.target[0].value[1 : 1 + example.prefix_length].tolist())


class _PieceTeller:
    """Turns a request's `TokenEvent`s into `StreamPiece`s."""

    def __init__(
        self, row: int, reader: TargetReader, automaton: TokenAutomaton, tell: Callable[[StreamPiece], object]
    ) -> None:
        self._row, self._reader, self._automaton, self._tell = row, reader, automaton, tell
        self._tokens: dict[int, list[int]] = {}
        self._shown: dict[int, tuple[str | None, str]] = {}

    def __call__(self, event: TokenEvent) -> None:
        tokens = self._tokens.setdefault(event.sequence, [])
        tokens.append(event.token)
        slot, text = self._reader.partial(tokens, self._automaton)
        last_slot, shown = self._shown.get(event.sequence, (None, ""))
        if slot != last_slot:
            shown = ""
        # The last token may hold half a character only.
        new = text[len(shown) :] if text.startswith(shown) and not text.endswith("\ufffd") else ""
        self._shown[event.sequence] = slot, shown + new
        self._tell(StreamPiece(self._row, event.sequence, slot, new, event.token, event.log_prob))


def requested(instruction: str | Sequence[Any], data: Row | Sequence[Row] | None) -> Iterator[tuple[str, Row, Row]]:
    """(instruction, row, own settings) of every request, whatever form `inference` was asked in."""
    if isinstance(instruction, str):
        for row in [data or {}] if data is None or isinstance(data, Mapping) else data:
            yield instruction, row, {}
    elif data is None and any(not isinstance(one, str) for one in instruction):
        for number, one in enumerate(instruction):
            if not isinstance(one, (tuple, list)) or not 2 <= len(one) <= 3 or not isinstance(one[0], str):
                raise OfakernValueError(
                    f"inference: request {number} must be (instruction, row) or (instruction, row, settings), "
                    f"got {one!r}"
                )
            yield one[0], one[1], one[2] if len(one) == 3 else {}
    else:
        rows = [data or {}] * len(instruction) if data is None or isinstance(data, Mapping) else list(data)
        if len(rows) != len(instruction):
            raise OfakernValueError(
                f"inference: data must have one entry per instruction ({len(instruction)}), got {len(rows)}"
            )
        yield from ((one, row, {}) for one, row in zip(instruction, rows, strict=True))

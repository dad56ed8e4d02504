"""What the engine needs of a model, what it keeps of a request, and what it tells of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from ofakern.generate import Finished, TokenEvent
from ofakern.modality.output import Output

__all__ = ["Answer", "Job", "Prepared", "Progress", "ServedModel", "Session"]

Answer = Output | list[Output]


@dataclass(frozen=True)
class Progress:
    """What a streaming callback gets with every token that is certain.

    slot: the target slot that is being written; text: its text so far. tokens: how many are certain. sequence: which
    answer, where several are drawn.
    """

    slot: str | None
    text: str
    tokens: int
    sequence: int = 0


class Prepared(Protocol):
    """A request as the model made it: what to encode, what to search for, how answers are read."""

    @property
    def search(self) -> Any:
        """A `SearchRequest`; None where no session can hold it."""

    @property
    def writer_key(self) -> Any: ...

    def read(self, answers: Any) -> Answer: ...

    def partial(self, tokens: Sequence[int]) -> tuple[str | None, str]: ...


class Session(Protocol):
    """`ofakern.generate.SearchSession`."""

    @property
    def running(self) -> int: ...

    def add(self, memory: Any, requests: Sequence[Any], model: Any = None) -> list[int]: ...

    def step(self) -> Sequence[Finished | TokenEvent]: ...

    def cancel(self, id: int) -> bool: ...


class ServedModel(Protocol):
    """`ofakern.GeneralistModel`, as far as the engine sees it. `prepare_request` is called from any thread."""

    def prepare_request(
        self,
        instruction: str,
        row: Mapping[str, Any],
        *,
        closed_set: Iterable[str] | None = None,
        keep_images: bool = True,
        **generation: Any,
    ) -> Any: ...

    def encode_requests(self, prepared: Sequence[Any]) -> Any: ...

    def search_session(self) -> Any: ...

    def writer(self, key: Any) -> Any: ...

    def run_request(self, prepared: Any) -> Any: ...


@dataclass(eq=False)
class Job:
    """One admitted request.

    alone: it is tried by itself after a failure among others. streamed: the tokens of each answer so far; reported:
    what the callback has seen of each, in this search or in one that failed.
    """

    prepared: Prepared
    future: Future[Answer]
    on_progress: Callable[[Progress], None] | None
    born: float
    alone: bool = False
    streamed: dict[int, list[int]] = field(default_factory=dict)
    reported: dict[int, Progress] = field(default_factory=dict)

    @property
    def wanted(self) -> bool:
        return not self.future.done()

    def request(self) -> Any:
        """What the session is given; it makes events of single tokens for those that somebody listens to."""
        self.streamed.clear()
        return dataclasses.replace(self.prepared.search, stream=self.on_progress is not None)

    def progress(self, event: TokenEvent) -> Progress | None:
        """What to report for a token; None when it was reported before."""
        tokens = self.streamed.setdefault(event.sequence, [])
        tokens.append(event.token)
        last = self.reported.get(event.sequence, Progress(None, "", 0, event.sequence))
        if len(tokens) <= last.tokens:
            return None
        slot, text = self.prepared.partial(tokens)
        if slot is None:  # the end, or known text between slots
            slot, text = last.slot, last.text
        # The last token may hold half a character only.
        progress = Progress(slot, text.rstrip("\ufffd"), len(tokens), event.sequence)
        self.reported[event.sequence] = progress
        return progress

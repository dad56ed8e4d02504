"""A model whose searches do what the request's text says, so that an engine can be watched at every step.

A request's instruction is its script: `count 3` gives three tokens, one a step; `encode fails`, `step fails 2`,
`own error`, `read fails` go wrong at that place; `whole` is no search at all.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ofakern.errors import DataError, OfakernRuntimeError
from ofakern.generate import Finished, Hypothesis, SearchRequest, TokenEvent
from ofakern.modality.output import Output


@dataclass
class Request:
    script: str
    writer_key: str = "text"
    search: SearchRequest | None = field(default_factory=SearchRequest)

    def read(self, answers: Sequence[Hypothesis]) -> Output:
        if self.script == "read fails":
            raise OfakernRuntimeError("read: script must work, got a failure")
        return Output(text=self.script, tokens=list(answers[0].tokens))

    def partial(self, tokens: Sequence[int]) -> tuple[str | None, str]:
        return "out", " ".join(map(str, tokens))


class ScriptedSession:
    def __init__(self, model: ScriptedModel) -> None:
        self.model = model
        self.requests: dict[int, tuple[Request, SearchRequest]] = {}
        self.tokens: dict[int, list[int]] = {}
        self._next = 0

    @property
    def running(self) -> int:
        return len(self.requests)

    def add(self, memory: list[Request], requests: Sequence[SearchRequest], model: Any = None) -> list[int]:
        assert {request.writer_key for request in memory} == {model}
        numbers = list(range(self._next, self._next + len(memory)))
        self._next += len(memory)
        for number, request, search in zip(numbers, memory, requests, strict=True):
            self.requests[number], self.tokens[number] = (request, search), []
        return numbers

    def cancel(self, id: int) -> bool:
        self.model.cancelled.append(self.requests[id][0].script)
        return self.requests.pop(id, None) is not None

    def step(self) -> list[Finished | TokenEvent]:
        self.model.wait_for_turn()
        self.model.batches.append([request.script for request, _ in self.requests.values()])
        events: list[Finished | TokenEvent] = []
        for number, (request, search) in list(self.requests.items()):
            words = request.script.split()
            tokens = self.tokens[number]
            if words[:2] == ["step", "fails"] and len(tokens) == int(words[2]):
                raise RuntimeError("a kernel failed")
            tokens.append(len(tokens))
            if search.stream:
                events.append(TokenEvent(number, 0, len(tokens) - 1, tokens[-1], -0.5))
            if request.script == "own error":
                events.append(Finished(number, [], OfakernRuntimeError("step: logits must be finite, got NaN")))
                del self.requests[number]
            elif len(tokens) == (int(words[1]) if words[0] == "count" else 4):
                events.append(Finished(number, [Hypothesis(tuple(tokens), -1.0, (-0.5,) * len(tokens))]))
                del self.requests[number]
        return events


class ScriptedModel:
    """`gate`: when set to a semaphore, every step waits for it."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.encoded: list[list[str]] = []
        self.cancelled: list[str] = []
        self.gate: threading.Semaphore | None = None

    def wait_for_turn(self) -> None:
        if self.gate is not None:
            assert self.gate.acquire(timeout=60)

    def prepare_request(
        self,
        instruction: str,
        row: Mapping[str, Any],
        *,
        closed_set: Iterable[str] | None = None,
        keep_images: bool = True,
        **generation: Any,
    ) -> Request:
        if instruction == "bad row":
            raise DataError("row 0: column 'img' must be there, got none")
        whole = instruction.startswith("whole")
        return Request(instruction, "other" if instruction == "count 7" else "text", None if whole else SearchRequest())

    def encode_requests(self, prepared: Sequence[Request]) -> list[Request]:
        self.encoded.append([request.script for request in prepared])
        if any(request.script == "encode fails" for request in prepared):
            raise RuntimeError("an encoder failed")
        return list(prepared)

    def search_session(self) -> ScriptedSession:
        return ScriptedSession(self)

    def writer(self, key: str) -> str:
        return key

    def run_request(self, prepared: Request) -> Output:
        if prepared.script == "whole fails":
            raise OfakernRuntimeError("speech: it must work, got a failure")
        return Output(text=prepared.script)

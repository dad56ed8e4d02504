"""Many clients of a real server at once: nothing is lost or mixed up, nobody is served beyond the limits."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from site_model import ROWS, post, sent, served

from ofakern.checkpoint import GeneralistModel
from ofakern.serve import Engine
from ofakern.serve.app import create_app
from ofakern.serve.request import Limits

CLIENTS = 16
KINDS: tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...] = (
    ("caption", ("img",), {}),
    ("vqa", ("img", "q"), {}),
    ("grounding", ("img", "name"), {"num_beams": 2}),
    ("caption", ("img",), {"num_beams": 1, "max_new_tokens": 5}),
    ("[IMAGE:img] which colour is it? -> [TEXT:w]", ("img",), {"do_sample": True, "seed": 3, "max_new_tokens": 8}),
    ("vqa", ("img", "q"), {"num_beams": 3, "num_return_sequences": 3}),
)


def mixed(number: int) -> tuple[dict[str, Any], tuple[str, dict[str, Any], dict[str, Any]]]:
    """(the body of the request of this number, what `inference` takes for it)."""
    task, columns, settings = KINDS[number % len(KINDS)]
    row = ROWS[number // len(KINDS) % len(ROWS)]
    return sent(task, row, columns, generation=settings), (task, {name: row[name] for name in columns}, settings)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def test_every_client_gets_its_own_answer(model: GeneralistModel) -> None:
    count = 3 * 36
    asked = [mixed(number) for number in range(count)]
    alone: dict[str, Any] = {}
    for body, (task, data, settings) in asked:
        found = model.inference(task, data, **settings)
        alone.setdefault(json.dumps(body), found if isinstance(found, list) else [found])
    engine = Engine(model, max_queue=CLIENTS, max_running=8)
    with served(create_app(engine)) as port, ThreadPoolExecutor(CLIENTS) as clients:
        responses = list(clients.map(lambda one: post(port, one[0]), asked))
    assert [status for status, _ in responses] == [200] * count
    for (body, _), (_, answer) in zip(asked, responses, strict=True):
        want = alone[json.dumps(body)]
        assert [one["text"] for one in answer["outputs"]] == [one.text for one in want]
        assert [one["score"] for one in answer["outputs"]] == pytest.approx([one.score for one in want], abs=1e-4)
        assert [one["boxes"] for one in answer["outputs"]] == [list(map(pytest.approx, one.boxes)) for one in want]
    text = engine.metrics.text()
    assert f'ofakern_answers_total{{outcome="answered"}} {count}\n' in text
    steps, requests = (number(text, f"ofakern_{name}_total") for name in ("steps", "step_requests"))
    assert requests > 2 * steps  # they did share steps


def number(text: str, name: str) -> float:
    return float(next(line for line in text.splitlines() if line.startswith(name + " ")).split()[1])


class Held:
    """An engine whose thread waits before every step, until it is let go."""

    def __init__(self, model: GeneralistModel, monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
        self._go = threading.Event()
        self.engine = Engine(model, **limits)
        step = self.engine._step_all
        monkeypatch.setattr(self.engine, "_step_all", lambda: (self._go.wait(60), step())[1])

    def go(self) -> None:
        self._go.set()


@pytest.fixture
def held(model: GeneralistModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(model, monkeypatch, max_queue=2, max_running=1)
    yield held
    held.go()


BODY = sent("caption", ROWS[0], ("img",))


def test_overload_is_answered_with_429(held: Held) -> None:
    with served(create_app(held.engine)) as port, ThreadPoolExecutor(8) as clients:
        first = clients.submit(post, port, BODY)
        until(lambda: held.engine.running == 1)
        waiting = [clients.submit(post, port, BODY) for _ in range(2)]
        until(lambda: held.engine.waiting == 2)
        with socket.create_connection(("127.0.0.1", port), 60) as client:
            client.sendall(request_bytes(json.dumps(BODY).encode()))
            head = client.recv(65536).decode()
        assert head.startswith("HTTP/1.1 429 ") and "retry-after: 1" in head.lower()
        assert post(port, BODY)[1]["error"]["type"] == "Overloaded"
        held.go()
        assert [one.result(60)[0] for one in (first, *waiting)] == [200, 200, 200]
    assert number(held.engine.metrics.text(), "ofakern_refused_total") == 2


def request_bytes(body: bytes, accept: str = "*/*") -> bytes:
    head = f"POST /v1/infer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAccept: {accept}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_frees_the_place(held: Held, stream: bool) -> None:
    with served(create_app(held.engine)) as port:
        clients = []
        for _ in range(3):  # one runs, two wait: it is full
            client = socket.create_connection(("127.0.0.1", port), 60)
            client.sendall(request_bytes(json.dumps({**BODY, "stream": stream}).encode()))
            clients.append(client)
            # One by one, the first until it runs: two in the queue before that would leave the third no place.
            until(lambda: held.engine.running == 1 and held.engine.waiting == len(clients) - 1)
        assert post(port, BODY)[0] == 429
        for client in clients:
            client.close()
        held.go()
        until(lambda: held.engine.running + held.engine.waiting == 0)
        assert post(port, BODY)[0] == 200
    assert number(held.engine.metrics.text(), 'ofakern_answers_total{outcome="cancelled"}') == 3


def test_a_body_that_never_ends_is_given_up(model: GeneralistModel) -> None:
    engine = Engine(model, max_queue=1)
    with served(create_app(engine, Limits(seconds=0.3))) as port:
        with socket.create_connection(("127.0.0.1", port), 60) as client:
            client.sendall(request_bytes(b"x" * 100)[:-50])
            assert client.recv(65536).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(("127.0.0.1", port), 60) as client:
            client.sendall(request_bytes(b"x" * 100)[:-50])
        until(lambda: 'responses_total{status="499"} 1' in engine.metrics.text())
        assert post(port, BODY)[0] == 200


def test_tokens_arrive_one_by_one(held: Held) -> None:
    with served(create_app(held.engine)) as port, socket.create_connection(("127.0.0.1", port), 60) as client:
        body = {**BODY, "stream": True, "generation": {"num_beams": 1}}
        client.sendall(request_bytes(json.dumps(body).encode(), "application/x-ndjson"))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")  # before the first token
        held.go()
        text = b""
        while b'"done"' not in text:
            text += client.recv(65536)
        assert text.count(b'"token"') > 3


def test_shutdown_answers_what_is_running(held: Held) -> None:
    with served(create_app(held.engine)) as port, ThreadPoolExecutor(1) as clients:
        response = clients.submit(post, port, BODY)
        until(lambda: held.engine.running == 1)
        threading.Timer(0.2, held.go).start()
    assert response.result(60)[0] == 200

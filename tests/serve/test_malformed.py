"""Requests that make no sense: each gets a JSON error, the server stays up, its memory stays flat.

The normal run sends a few hundred; `pytest -m slow tests/serve` sends 10,000 (OFAKERN_MALFORMED=n: any number).
"""

from __future__ import annotations

import base64
import json
import os
import random
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from site_model import ROWS, png, sent
from starlette.testclient import TestClient

from ofakern.checkpoint import GeneralistModel
from ofakern.serve import Engine
from ofakern.serve.app import create_app
from ofakern.serve.request import Limits

PNG = png(ROWS[0]["img"])
GOOD = sent("vqa", ROWS[0], ("img", "q"))
JSON = "application/json"
WORDS = "caption|vqa|| |->|[IMAGE:img]|[|]]|\0|\ud800|[TEXT:a,x=|…|'".split("|") + ["|||", "é" * 400]
TEXTS: tuple[Any, ...] = ("", "x" * 3000, "\ud800", "\0", "data:image/png;base64,")
VALUES = (None, True, 0, -1, 1e308, 10**400, [], {}, [[[[[[]]]]]], {"file": "../a"}, {"url": "http://x"}, *TEXTS)
FIELDS = ("instruction", "data", "generation", "closed_set", "stream", "other")
SETTINGS = ("num_beams", "max_len", "temperature", "top_k", "compat", "seed", "length_penalty", "q")


def malformed(rng: random.Random) -> tuple[bytes, str]:
    """(a body, its content type)."""
    kind = rng.choice(("bytes", "cut", "flip", "field", "value", "image", "instruction", "form", "nested", "huge"))
    text = json.dumps(GOOD).encode()
    if kind == "bytes":
        return rng.randbytes(rng.randrange(300)), rng.choice((JSON, "multipart/form-data; boundary=x", "text/html", ""))
    if kind == "cut":
        return text[: rng.randrange(len(text))], JSON
    if kind == "flip":
        broken = bytearray(text)
        for _ in range(rng.randrange(1, 6)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        return bytes(broken), JSON
    if kind == "nested":
        return b"[" * rng.randrange(50_000), JSON
    if kind == "huge":
        return json.dumps({**GOOD, "data": {"img": "A" * 60_000, "q": "w " * 9000}}).encode(), JSON
    if kind == "form":
        return form(rng), "multipart/form-data; boundary=b"
    return json.dumps(changed(kind, rng)).encode(), JSON


def changed(kind: str, rng: random.Random) -> dict[str, Any]:
    if kind == "field":
        return {**GOOD, rng.choice(FIELDS): rng.choice(VALUES)}
    if kind == "value":
        data = {"img": rng.choice(VALUES), "q": rng.choice(VALUES)}
        return {**GOOD, "generation": {rng.choice(SETTINGS): rng.choice(VALUES)}, "data": data}
    if kind == "image":
        broken = bytearray(PNG[: rng.randrange(len(PNG))])
        for _ in range(rng.randrange(4)):
            if broken:
                broken[rng.randrange(len(broken))] = rng.randrange(256)
        return {**GOOD, "data": {"img": base64.b64encode(bytes(broken)).decode(), "q": "?"}}
    return {**GOOD, "instruction": "".join(rng.choice(WORDS) for _ in range(rng.randrange(8)))}


def form(rng: random.Random) -> bytes:
    parts = []
    for _ in range(rng.randrange(4)):
        name = rng.choice(("request", "instruction", "img", "q", "", "stream", "closed_set"))
        value = rng.choice((PNG[: rng.randrange(len(PNG))], b"caption", b"{", b"[]", rng.randbytes(50)))
        file = rng.choice((b"", b'; filename="a.png"'))
        parts.append(b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name.encode(), file, value))
    return b"".join(parts) + rng.choice((b"--b--\r\n", b"", b"--"))


@pytest.fixture(scope="module")
def client(model: GeneralistModel) -> Iterator[TestClient]:
    limits = Limits(body=100_000, pixels=100_000, characters=2000)
    with TestClient(create_app(Engine(model), limits), raise_server_exceptions=False) as client:
        yield client


def bombard(client: TestClient, count: int, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(count):
        body, kind = malformed(rng)
        response = client.post("/v1/infer", content=body, headers={"Content-Type": kind})
        # Some changes leave a request that makes sense: those are answered.
        assert response.status_code in (200, 400, 404, 413, 415, 422), (seed, number, kind, body[:300], response.text)
        if response.status_code != 200:
            error = response.json()["error"]
            assert error["message"] and error["status"] == response.status_code and "Traceback" not in response.text


def test_a_few_hundred_malformed_requests(client: TestClient) -> None:
    bombard(client, 300, seed=1)
    assert client.post("/v1/infer", json=GOOD).status_code == 200
    assert client.get("/health").json() == {"status": "ok", "waiting": 0, "running": 0}


@pytest.mark.slow
def test_ten_thousand_malformed_requests_leave_memory_flat(client: TestClient) -> None:
    count = int(os.environ.get("OFAKERN_MALFORMED", "10000"))
    bombard(client, count // 5, seed=2)  # caches and allocators fill first
    before = psutil.Process().memory_info().rss
    bombard(client, count - count // 5, seed=3)
    grown = (psutil.Process().memory_info().rss - before) / 2**20
    assert grown < 24, f"{grown:.1f} MiB more after {count} requests"
    assert client.post("/v1/infer", json=GOOD).status_code == 200
    assert client.get("/health").json() == {"status": "ok", "waiting": 0, "running": 0}

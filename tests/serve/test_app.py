"""The HTTP server: endpoints, uploads, streams, errors."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from site_model import ROWS, as_text, png, sent
from starlette.testclient import TestClient

from ofakern.checkpoint import GeneralistModel
from ofakern.serve import Engine
from ofakern.serve.app import create_app
from ofakern.serve.request import Limits


@pytest.fixture(scope="module")
def client(model: GeneralistModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "red.png").write_bytes(png(ROWS[0]["img"]))
    limits = Limits(body=100_000, pixels=100_000, characters=500, files=folder)
    with TestClient(create_app(Engine(model), limits), raise_server_exceptions=False) as client:
        yield client


def answer(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    outputs = response.json()["outputs"]
    assert len(outputs) == 1
    found: dict[str, Any] = outputs[0]
    return found


def refused(response: Any, status: int, message: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["status"] == status and message in error["message"] and error["type"]
    assert "Traceback" not in response.text and ".py" not in response.text


# ---------------------------------------------------------------------------------------------------------- answers


def test_answers_are_those_of_inference(client: TestClient, model: GeneralistModel) -> None:
    for task, columns in (("caption", ("img",)), ("vqa", ("img", "q")), ("grounding", ("img", "name"))):
        for row in ROWS[:3]:
            found = answer(client.post("/v1/infer", json=sent(task, row, columns)))
            want = model.inference(task, {name: row[name] for name in columns})
            assert found["text"] == want.text and found["score"] == pytest.approx(want.score, abs=1e-4)
            assert found["tokens"] == len(want.tokens)
            assert found["boxes"] == [pytest.approx(box) for box in want.boxes]
            assert set(found["values"]) == set(want.values)


def test_a_new_instruction_with_a_closed_set_and_settings(client: TestClient) -> None:
    instruction = "[IMAGE:img] what does the image describe? -> [TEXT:word]"
    body = sent(instruction, ROWS[2], ("img",), closed_set=["one", "two"], generation={"beam_size": 2})
    assert answer(client.post("/v1/infer", json=body))["text"] in ("one", "two")
    body = sent("caption", ROWS[2], ("img",), generation={"num_return_sequences": 3})
    outputs = client.post("/v1/infer", json=body).json()["outputs"]
    assert len(outputs) == 3 and outputs[0]["score"] >= outputs[1]["score"] >= outputs[2]["score"]


def test_an_image_comes_as_upload_and_from_the_folder(client: TestClient, model: GeneralistModel) -> None:
    want = model.inference("caption", {"img": ROWS[0]["img"]}).text
    upload = {"img": ("red.png", png(ROWS[0]["img"]), "image/png")}
    assert answer(client.post("/v1/infer", files=upload, data={"instruction": "caption"}))["text"] == want
    request = json.dumps({"instruction": "caption", "generation": {"num_beams": 1}})
    assert answer(client.post("/v1/infer", files=upload, data={"request": request}))["tokens"] > 1
    body = {"instruction": "caption", "data": {"img": {"file": "red.png"}}}
    assert answer(client.post("/v1/infer", json=body))["text"] == want
    vqa = client.post("/v1/infer", files=upload, data={"instruction": "vqa", "q": ROWS[0]["q"]})
    assert answer(vqa)["text"] == model.inference("vqa", {"img": ROWS[0]["img"], "q": ROWS[0]["q"]}).text


# ----------------------------------------------------------------------------------------------------------- streams


def test_tokens_come_in_order_and_then_the_answer(client: TestClient, model: GeneralistModel) -> None:
    want = model.inference("caption", {"img": ROWS[1]["img"]}, num_beams=1)
    body = sent("caption", ROWS[1], ("img",), stream=True, generation={"num_beams": 1})
    lines = client.post("/v1/infer", json=body, headers={"Accept": "application/x-ndjson"})
    assert lines.headers["content-type"].startswith("application/x-ndjson")
    events = [json.loads(line) for line in lines.text.splitlines()]
    assert [one["event"] for one in events] == ["token"] * (len(events) - 1) + ["done"]
    assert [one["tokens"] for one in events[:-1]] == list(range(1, len(want.tokens) + 1))
    texts = [one["text"] for one in events[:-1]]
    assert texts[-1] == want.text and all(later.startswith(text) for text, later in zip(texts, texts[1:], strict=False))
    assert events[-1]["outputs"][0]["text"] == want.text

    events_sent = client.post("/v1/infer", json=body)
    assert events_sent.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in events_sent.text.strip().split("\n\n")]
    assert [block[0] for block in blocks] == ["event: token"] * (len(blocks) - 1) + ["event: done"]
    assert json.loads(blocks[-1][1].removeprefix("data: ")) == {"outputs": events[-1]["outputs"]}


def test_a_stream_tells_of_an_error(
    client: TestClient, model: GeneralistModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ofakern.serve.app.answer_of", lambda found: 1 / 0)
    body = sent("caption", ROWS[1], ("img",), stream=True)
    response = client.post("/v1/infer", json=body, headers={"Accept": "application/x-ndjson"})
    last = json.loads(response.text.splitlines()[-1])
    assert last["event"] == "error" and last["error"]["status"] == 500 and "division" not in response.text
    refused(client.post("/v1/infer", json=sent("caption", ROWS[1], ("img",))), 500, "the server failed")


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"instruction": "captions", "data": {}}, 422, "known task"),
        ({"instruction": "[IMAGE:img -> [TEXT:cap]", "data": {}}, 422, "^"),
        ({"instruction": "caption", "data": {}}, 422, "column 'img' must be there"),
        ({"instruction": "caption", "data": {"img": None}}, 422, "column 'img'"),
        ({"instruction": "caption", "data": {"pic": "x"}}, 422, "columns of the instruction"),
        ({"instruction": "caption", "data": {"img": {"file": "../x"}}}, 404, "served folder"),
        ({"instruction": "caption", "data": {"img": "!"}}, 422, "base64"),
        ({"instruction": "caption", "data": {"img": "aGVsbG8="}}, 415, "must be an image"),
        ({"instruction": "[DATABASE:d] -> [TEXT:a]", "data": {"d": "x"}}, 422, ""),
        ({"instruction": "[VIDEO:v] -> [TEXT:a]", "data": {"v": []}}, 422, "adaptors"),
        ({"instruction": "caption", "generation": {"num_beams": 0}, "data": {"img": "%"}}, 422, ""),
        ({"instruction": "x" * 501}, 422, "at most 500 characters"),
        (["caption"], 400, "JSON object"),
        ({"data": {}}, 400, "instruction must be text"),
    ],
)
def test_errors_are_json_with_the_librarys_message(client: TestClient, body: Any, status: int, message: str) -> None:
    refused(client.post("/v1/infer", json=body), status, message)


def test_settings_out_of_range_are_the_librarys_to_refuse(client: TestClient) -> None:
    for settings in ({"num_beams": 0}, {"top_p": 2.0}, {"temperature": 0}, {"num_beams": 2, "num_return_sequences": 3}):
        refused(
            client.post("/v1/infer", json=sent("caption", ROWS[0], ("img",), generation=settings)), 422, "generation"
        )


def test_errors_before_the_request_is_read(client: TestClient) -> None:
    json_type = {"Content-Type": "application/json"}
    refused(client.post("/v1/infer", content=b"{", headers=json_type), 400, "must be JSON")
    refused(client.post("/v1/infer", content=b"{}", headers={"Content-Type": "text/plain"}), 415, "text/plain")
    refused(client.post("/v1/infer", content=b"{}"), 415, "content type")
    refused(client.post("/v1/infer", content=b"x" * 100_001, headers=json_type), 413, "at most 100000 bytes")

    def chunks() -> Iterator[bytes]:  # nothing announces their sum
        for _ in range(30):
            yield b" " * 5000

    refused(client.post("/v1/infer", content=chunks(), headers=json_type), 413, "at most 100000 bytes")
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for content in (
        b"",
        b"--b",
        b"--b\r\n\r\nx",
        b'--b\r\nContent-Disposition: form-data; name="request"\r\n\r\n[]\r\n--b--',
    ):
        assert client.post("/v1/infer", content=content, headers=form).status_code == 400
    assert client.post("/v1/infer", content=b"", headers={"Content-Type": "multipart/form-data"}).status_code == 400
    refused(client.get("/v1/infer"), 405, "GET /v1/infer")
    refused(client.get("/nothing"), 404, "GET /nothing")


# ----------------------------------------------------------------------------------------------------- other places


def test_tasks(client: TestClient) -> None:
    found = {task["name"]: task for task in client.get("/v1/tasks").json()["tasks"]}
    assert set(found) == {"caption", "vqa", "grounding"}
    assert found["vqa"]["inputs"] == [
        {"name": "img", "modality": "IMAGE", "list": False},
        {"name": "q", "modality": "TEXT", "list": False},
    ]
    assert found["grounding"]["outputs"] == [{"name": "box", "modality": "BOX", "list": False}]
    assert found["vqa"]["answers"] == {"answer": 6}


def test_health_and_metrics(model: GeneralistModel) -> None:
    engine = Engine(model)
    with TestClient(create_app(engine), raise_server_exceptions=False) as client:
        assert client.get("/health").json() == {"status": "ok", "waiting": 0, "running": 0}
        answer(client.post("/v1/infer", json=sent("vqa", ROWS[0], ("img", "q"))))
        assert client.post("/v1/infer", json={"instruction": "nothing"}).status_code == 422
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = response.text.splitlines()
        for line in (
            'ofakern_http_responses_total{status="200"} 2',
            'ofakern_http_responses_total{status="422"} 1',
            'ofakern_answers_total{outcome="answered"} 1',
            "ofakern_request_seconds_count 1",
            "ofakern_queue_requests 0",
            "ofakern_running_requests 0",
        ):
            assert line in lines
        tokens = next(line for line in lines if line.startswith("ofakern_tokens_total"))
        assert int(tokens.split()[1]) >= 2
        assert engine.drain(5)
        health = client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "stopping"
        response = client.post("/v1/infer", json=sent("caption", ROWS[0], ("img",)))
        refused(response, 503, "Engine")
    assert not engine.accepting


def test_the_engine_stops_with_the_application(model: GeneralistModel) -> None:
    engine = Engine(model)
    with TestClient(create_app(engine)):
        assert engine.accepting
    assert not engine.accepting


def test_base64_of_both_alphabets(client: TestClient) -> None:
    data = png(ROWS[0]["img"])
    for text in (as_text(ROWS[0]["img"]), base64.urlsafe_b64encode(data).decode()):
        answer(client.post("/v1/infer", json={"instruction": "caption", "data": {"img": text}}))


def test_nothing_is_read_outside_the_folder(client: TestClient, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(ROWS[0]["img"]))
    for value in (str(secret), {"file": str(secret)}, {"path": str(secret)}, {"bytes": None, "path": str(secret)}):
        response = client.post("/v1/infer", json={"instruction": "caption", "data": {"img": value}})
        assert response.status_code in (404, 415, 422), response.text

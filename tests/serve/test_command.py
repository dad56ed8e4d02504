"""`ofakern serve` as a process: it says where it listens, answers, and ends by itself when it is told to."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from site_model import ROWS, post, sent

from ofakern.checkpoint import GeneralistModel
from ofakern.cli import serve
from ofakern.cli.main import build_parser, main


@pytest.fixture(scope="module")
def saved(model: GeneralistModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def test_a_process_answers_and_ends(saved: Path, model: GeneralistModel) -> None:
    port = free_port()
    arguments = [str(saved), "--port", str(port), "--threads", "1", "--max-queue", "4"]
    command = [sys.executable, "-m", "ofakern", "serve", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            end = time.monotonic() + 120
            while not listens(port):
                assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
                time.sleep(0.05)
            status, answer = post(port, sent("caption", ROWS[0], ("img",)))
            assert status == 200
            assert answer["outputs"][0]["text"] == model.inference("caption", {"img": ROWS[0]["img"]}).text
            process.send_signal(signal.SIGTERM)
            text = process.communicate(timeout=60)[0]
        finally:
            process.kill()
    assert f"http://127.0.0.1:{port}" in text and "POST /v1/infer" in text and "Traceback" not in text
    assert process.returncode in (0, -signal.SIGTERM)  # uvicorn hands the signal on when all is done


def listens(port: int) -> bool:
    try:
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return bool(json.loads(connection.getresponse().read())["status"] == "ok")
    except OSError:
        return False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port must be 0 to 65535"),
        (["--max-body", "0"], "body must be above 0"),
        (["--files", "nowhere"], "files must be a folder"),
        (["--max-queue", "0"], "max_queue must be an integer of at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_mistakes_are_one_line(
    saved: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(saved), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_missing_server_is_named(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(saved)]) == 2
    assert "pip install 'ofakern[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", serve.DTYPES)
def test_weights_have_the_type_that_was_asked_for(saved: Path, dtype: str) -> None:
    args = build_parser("serve").parse_args(["serve", str(saved), "--dtype", dtype])
    model = serve.load(args)
    wanted = torch.bfloat16 if dtype == "bf16" else torch.float32
    assert model.network.output_weight.dtype == wanted
    found = model.inference("vqa", {"img": ROWS[0]["img"], "q": ROWS[0]["q"]})
    assert found.text in {row["answer"] for row in ROWS}

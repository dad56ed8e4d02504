"""A small model that knows the scenes of the checkpoint tests by heart, and a real server on a port of this machine."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import uvicorn
from PIL import Image
from scenes import scenes, small_model, tasks
from starlette.types import ASGIApp

from ofakern.checkpoint import GeneralistModel
from ofakern.train import Trainer

ROWS = scenes()


def trained_model(updates: int = 40) -> GeneralistModel:
    model = small_model()
    Trainer(
        progress=False,
        tensorboard=False,
        learning_rate=1e-2,
        betas=(0.9, 0.98),
        warmup_ratio=0.1,
        weight_decay=0.0,
        max_updates=updates,
        label_smoothing=0.0,
    ).fit(model=model, tasks=tasks())
    model.network.eval()
    return model


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def as_text(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def sent(task: str, row: dict[str, Any], columns: tuple[str, ...], **fields: Any) -> dict[str, Any]:
    """A JSON body for a row: its image as base64."""
    data = {name: as_text(row[name]) if name == "img" else row[name] for name in columns}
    return {"instruction": task, "data": data, **fields}


@contextmanager
def served(app: ASGIApp) -> Iterator[int]:
    """The port of a real server; it is shut down as a signal would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def post(port: int, body: Any, path: str = "/v1/infer", **headers: str) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, raw, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()

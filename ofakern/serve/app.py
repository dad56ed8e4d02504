"""The HTTP server around an engine: a starlette application.

`POST /v1/infer`, `GET /health`, `GET /metrics`, `GET /v1/tasks` and a page to try it at `/`. docs/SERVING.md describes
them. Every error is a JSON body `{"error": {"type", "message", "status"}}`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from importlib.resources import files
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ofakern.checkpoint import GeneralistModel
from ofakern.errors import OfakernError
from ofakern.serve.answers import answer_of
from ofakern.serve.body import read_body
from ofakern.serve.contract import Progress
from ofakern.serve.engine import Engine, Place
from ofakern.serve.errors import Overloaded, RequestError, Stopped, status_of
from ofakern.serve.media import read_row
from ofakern.serve.metrics import CONTENT_TYPE
from ofakern.serve.request import Ask, Limits, read_ask
from ofakern.serve.tasks import describe_tasks

__all__ = ["create_app"]

_log = logging.getLogger("ofakern.serve")

_RETRY_AFTER = "1"  # seconds; a queue is gone through in about that time
_NDJSON = "application/x-ndjson"
_CLIENT_GONE = 499  # what nginx logs for it; nobody is there to read it
# Two threads read and resize pictures while the engine's thread searches: more would only take its cores.
_PREPARING_THREADS = 2
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "media-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(engine: Engine, limits: Limits | None = None, *, drain_seconds: float = 30.0) -> Starlette:
    """The application. When it shuts down it drains the engine for at most `drain_seconds` and stops it."""
    server = _Server(engine, limits or Limits())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(server.close, drain_seconds)

    routes = [
        Route("/", server.page, methods=["GET"]),
        Route("/health", server.health, methods=["GET"]),
        Route("/metrics", server.metrics, methods=["GET"]),
        Route("/v1/tasks", server.tasks, methods=["GET"]),
        Route("/v1/infer", server.infer, methods=["POST"]),
    ]
    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        HTTPException: server.refused,
        OfakernError: server.failed,
        Exception: server.failed,
    }
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


class _Server:
    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine, self._limits = engine, limits
        self._pool = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="ofakern-prepare")
        self._responses = engine.metrics.counter("ofakern_http_responses_total", "Responses, by status.", "status")

    def close(self, seconds: float) -> None:
        self._engine.drain(seconds)
        self._engine.stop()
        self._pool.shutdown()

    @property
    def _model(self) -> GeneralistModel:
        model: GeneralistModel = self._engine.model  # type: ignore[assignment]
        return model

    # ---------------------------------------------------------------------------------------------------- answers

    def _respond(self, response: Response) -> Response:
        self._responses.add(label=str(response.status_code))
        return response

    async def page(self, request: Request) -> Response:
        return self._respond(HTMLResponse(_page(), headers={"Content-Security-Policy": _POLICY}))

    async def health(self, request: Request) -> Response:
        ready = self._engine.accepting
        about = {
            "status": "ok" if ready else "stopping",
            "waiting": self._engine.waiting,
            "running": self._engine.running,
        }
        return self._respond(JSONResponse(about, 200 if ready else 503))

    async def metrics(self, request: Request) -> Response:
        return self._respond(Response(self._engine.metrics.text(), media_type=CONTENT_TYPE))

    async def tasks(self, request: Request) -> Response:
        return self._respond(JSONResponse(describe_tasks(self._model)))

    async def infer(self, request: Request) -> Response:
        with self._engine.reserve() as place:  # before the body: no more bodies are held than the queue has places
            try:
                ask = read_ask(await read_body(request, self._limits), self._limits)
            except ClientDisconnect:
                return self._respond(PlainTextResponse("", _CLIENT_GONE))
            steps: asyncio.Queue[Progress] = asyncio.Queue()
            loop = asyncio.get_running_loop()

            def listen(progress: Progress) -> None:
                loop.call_soon_threadsafe(steps.put_nowait, progress)

            submit = partial(self._submit, place, ask, listen if ask.stream else None)
            future = await _finished_thread(loop.run_in_executor(self._pool, submit))
        if ask.stream:
            return self._respond(self._stream(request, future, steps))
        return await self._whole(request, future)

    def _submit(self, place: Place, ask: Ask, listen: Callable[[Progress], None] | None) -> Future[Any]:
        """Reads media and prepares the request, in a thread of its own; the engine answers it in another."""
        row = read_row(self._model.plan_for(ask.instruction), ask.data, self._limits)
        settings = {"closed_set": ask.closed_set, "keep_images": False, **ask.generation}
        try:
            return place.submit(ask.instruction, row, on_progress=listen, **settings)
        finally:
            _close(row)

    async def _whole(self, request: Request, future: Future[Any]) -> Response:
        answer = asyncio.wrap_future(future)
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return self._respond(PlainTextResponse("", _CLIENT_GONE))
            outputs = await self._in_pool(partial(answer_of, answer.result()))
            return self._respond(JSONResponse({"outputs": outputs}))
        finally:
            gone.cancel()
            future.cancel()

    def _stream(self, request: Request, future: Future[Any], steps: asyncio.Queue[Progress]) -> Response:
        lines = _NDJSON in request.headers.get("accept", "")
        write = _as_line if lines else _as_event

        async def content() -> AsyncIterator[bytes]:
            try:
                async for progress in _until(future, steps):
                    yield write("token", _shown(progress))
                try:
                    outputs = await self._in_pool(partial(answer_of, future.result()))
                except Exception as error:
                    yield write("error", {"error": self._described(error)})
                else:
                    yield write("done", {"outputs": outputs})
            finally:
                future.cancel()  # the client has gone: the request leaves its search

        return StreamingResponse(
            content(), media_type=_NDJSON if lines else "text/event-stream", headers={"Cache-Control": "no-store"}
        )

    async def _in_pool(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    # ----------------------------------------------------------------------------------------------------- errors

    def _described(self, error: Exception) -> dict[str, Any]:
        status = status_of(error)
        if status == 500:
            # What went wrong inside is for the log; a stranger learns that it did.
            _log.error("a request failed", exc_info=error)
            return {"type": "InternalError", "message": "the server failed on this request", "status": 500}
        kind = "RequestError" if isinstance(error, RequestError) else type(error).__name__
        return {"type": kind, "message": str(error), "status": status}

    async def failed(self, request: Request, error: Exception) -> Response:
        described = self._described(error)
        headers = {"Retry-After": _RETRY_AFTER} if isinstance(error, (Overloaded, Stopped)) else None
        return self._respond(JSONResponse({"error": described}, described["status"], headers))

    async def refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"request: {request.method} {request.url.path[:80]} must be known, got: {error.detail}"
        about = {"type": "RequestError", "message": message, "status": error.status_code}
        return self._respond(JSONResponse({"error": about}, error.status_code, dict(error.headers or {})))


def _close(value: Any) -> None:
    """Let go of the pictures in a row, of which many may wait: the request holds what the model looks at."""
    if isinstance(value, Image.Image):
        value.close()
    elif isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            _close(one)


async def _finished_thread(work: asyncio.Future[Future[Any]]) -> Future[Any]:
    """The result of a thread; when the waiting task is cancelled the request that the thread makes is too."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(lambda done: done.cancelled() or done.exception() or done.result().cancel())
        raise


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _until(future: Future[Any], steps: asyncio.Queue[Progress]) -> AsyncIterator[Progress]:
    """What arrives in `steps` until the future is done, and what is left then."""
    done = asyncio.ensure_future(asyncio.wrap_future(future))
    try:
        while not done.done():
            step = asyncio.ensure_future(steps.get())
            await asyncio.wait((done, step), return_when=asyncio.FIRST_COMPLETED)
            if step.done():
                yield step.result()
            else:
                step.cancel()
        done.exception()  # it is looked at where the result is
        while not steps.empty():
            yield steps.get_nowait()
    finally:
        done.cancel()


def _shown(one: Progress) -> dict[str, Any]:
    return {"slot": one.slot, "text": one.text, "tokens": one.tokens, "answer": one.sequence}


def _as_event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _as_line(name: str, data: dict[str, Any]) -> bytes:
    return json.dumps({"event": name, **data}, ensure_ascii=False).encode() + b"\n"


@lru_cache(maxsize=1)
def _page() -> str:
    return files("ofakern.serve").joinpath("page.html").read_text(encoding="utf-8")

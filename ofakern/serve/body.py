"""The bytes of a request: JSON or a form with uploads, never more than the limit, never for longer than the time."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from ofakern.serve.errors import RequestError
from ofakern.serve.request import Limits, parse_json

__all__ = ["read_body"]

# Fields of a form that are no columns; `request` is a whole JSON body, the others are its fields.
_TEXTS = ("instruction",)
_JSON = ("closed_set", "generation", "stream")


async def read_body(request: Request, limits: Limits) -> Any:
    """The JSON body, or a form's fields as one: its files are bytes in `data`.

    Raises RequestError: 400 for a body that is no JSON or no form, 408 when it comes too slowly, 413 when it is too
    large, 415 for another content type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise RequestError(
            415, f"request: content type must be application/json or multipart/form-data, got {kind[:80] or 'none'!r}"
        )
    _check_announced(request.headers.get("content-length"), limits)
    bounded = Request(request.scope, _bounded(request.receive, limits))
    read = _json(bounded) if kind == "application/json" else _form(bounded, limits)
    try:
        return await asyncio.wait_for(read, limits.seconds)
    except asyncio.TimeoutError as error:
        raise RequestError(
            408, f"request: body must arrive within {limits.seconds:g} seconds, got part of it"
        ) from error


def _check_announced(length: str | None, limits: Limits) -> None:
    if length is not None and length.isdecimal() and int(length[:20]) > limits.body:
        raise RequestError(413, f"request: body must have at most {limits.body} bytes, got {length[:20]}")


def _bounded(receive: Receive, limits: Limits) -> Receive:
    """`receive`, until it has given more bytes than a body may have: what was announced need not be true."""
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > limits.body:
            raise RequestError(413, f"request: body must have at most {limits.body} bytes, got more")
        return message

    return limited


async def _json(request: Request) -> Any:
    return parse_json(await request.body(), "body")


async def _form(request: Request, limits: Limits) -> dict[str, Any]:
    try:
        async with request.form(
            max_files=limits.media, max_fields=limits.media + 32, max_part_size=limits.body
        ) as form:
            return await _fields(list(form.multi_items()))
    except (RequestError, ClientDisconnect):
        raise
    except HTTPException as error:
        raise RequestError(400, f"request: body must be a form, got: {str(error.detail)[:200]}") from error
    except Exception as error:  # the parser raises KeyError, UnicodeDecodeError and more on damaged forms
        raise RequestError(400, f"request: body must be a form, got {type(error).__name__}") from error


async def _fields(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A form's parts as the fields of a JSON body; a column that comes several times is a list."""
    body: dict[str, Any] = {}
    columns: dict[str, list[Any]] = {}
    for name, value in items:
        if isinstance(value, UploadFile):
            columns.setdefault(name, []).append(await value.read())
        elif name == "request":
            given = parse_json(value, "field 'request'")
            if not isinstance(given, dict):
                raise RequestError(400, f"request: field 'request' must be a JSON object, got {type(given).__name__}")
            body.update(given)
        elif name in _TEXTS:
            body[name] = value
        elif name in _JSON:
            body[name] = parse_json(value, f"field {name!r}")
        else:
            columns.setdefault(name, []).append(value)
    data = body.get("data") or {}
    if not isinstance(data, dict):
        raise RequestError(400, f"request: data must be an object of columns, got {type(data).__name__}")
    body["data"] = data | {name: values[0] if len(values) == 1 else values for name, values in columns.items()}
    return body

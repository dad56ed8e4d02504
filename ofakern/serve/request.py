"""The body of a request: what it asks, checked before any model sees it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ofakern.errors import OfakernValueError
from ofakern.generate import GenerationConfig
from ofakern.generate.config import OFASYS_NAMES
from ofakern.serve.errors import RequestError

__all__ = ["Ask", "Limits", "parse_json", "read_ask"]

_FIELDS = {"instruction", "data", "closed_set", "generation", "stream"}
_DEEPEST = 8


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    body: bytes. pixels: of one image, or of one frame of a video. samples: of one sound, all channels. characters: of
    one text field (and of a table, all cells). media: images, sounds and videos. frames: of a video. answers: of a
    closed set.
    settings: largest value of a generation setting. files: the folder that `{"file": name}` reads from. urls: whether
    `{"url": ...}` is fetched. seconds: to send the body, and to fetch a URL.
    """

    body: int = 32 * 2**20
    pixels: int = 40_000_000
    samples: int = 32_000_000
    characters: int = 20_000
    media: int = 32
    frames: int = 3000
    answers: int = 10_000
    settings: Mapping[str, int] = field(
        default_factory=lambda: {
            "num_beams": 16,
            "max_new_tokens": 4096,
            "num_return_sequences": 16,
            "no_repeat_ngram_size": 64,
            "diffusion_steps": 1000,
            "frames": 2000,
        }
    )
    files: Path | None = None
    urls: bool = False
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("body", "pixels", "samples", "characters", "media", "frames", "answers", "seconds"):
            if not getattr(self, name) > 0:
                raise OfakernValueError(f"serve: {name} must be above 0, got {getattr(self, name)!r}")
        if self.files is not None and not self.files.is_dir():
            raise OfakernValueError(f"serve: files must be a folder, got {str(self.files)!r}")


@dataclass(frozen=True)
class Ask:
    """A request as it was sent: values of `data` may still be base64 text, names of files or URLs."""

    instruction: str
    data: Mapping[str, Any]
    closed_set: tuple[str, ...] | None
    generation: Mapping[str, Any]
    stream: bool


def parse_json(text: str | bytes, where: str) -> Any:
    """Raises RequestError (400) for what is no JSON; NaN, infinity and halves of characters are none."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if (b"\\u" in text) if isinstance(text, bytes) else ("\\u" in text):
            json.dumps(value, ensure_ascii=False).encode()  # half a character could not be written anywhere
        return value
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = "too many brackets inside one another" if isinstance(error, RecursionError) else str(error)
        raise RequestError(400, f"request: {where} must be JSON, got: {reason[:200]}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def read_ask(body: Any, limits: Limits) -> Ask:
    """The fields of a request. Raises RequestError: 400 for a wrong type, 422 for a value outside its limit."""
    if not isinstance(body, dict):
        raise RequestError(400, f"request: body must be a JSON object, got {type(body).__name__}")
    unknown = sorted(set(body) - _FIELDS)
    if unknown:
        raise RequestError(400, f"request: fields must be among {', '.join(sorted(_FIELDS))}, got {unknown[0][:80]!r}")
    instruction = body.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        shown = type(instruction).__name__ if not isinstance(instruction, str) else "blanks"
        raise RequestError(400, f"request: instruction must be text (or the name of a task), got {shown}")
    data = {} if body.get("data") is None else body["data"]
    if not isinstance(data, dict):
        raise RequestError(400, f"request: data must be an object of columns, got {type(data).__name__}")
    stream = body.get("stream", False)
    if not isinstance(stream, bool):
        raise RequestError(400, f"request: stream must be true or false, got {type(stream).__name__}")
    _check_length("instruction", instruction, limits)
    return Ask(
        instruction,
        data,
        _closed_set(body.get("closed_set"), limits),
        _settings(body.get("generation"), limits),
        stream,
    )


def _check_length(name: str, text: str, limits: Limits) -> None:
    if len(text) > limits.characters:
        raise RequestError(422, f"request: {name} must have at most {limits.characters} characters, got {len(text)}")


def _closed_set(value: Any, limits: Limits) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        raise RequestError(400, "request: closed_set must be a list of texts")
    if not 1 <= len(value) <= limits.answers:
        raise RequestError(422, f"request: closed_set must have 1 to {limits.answers} answers, got {len(value)}")
    for answer in value:
        _check_length("answer of closed_set", answer, limits)
    return tuple(value)


_TYPES: Mapping[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float)}


def _settings(value: Any, limits: Limits) -> dict[str, Any]:
    """Settings by `GenerationConfig`'s names; types and sizes are checked here, ranges there."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(400, f"request: generation must be an object of settings, got {type(value).__name__}")
    kinds = {one.name: str(one.type) for one in dataclasses.fields(GenerationConfig)}
    for given, setting in value.items():
        name = OFASYS_NAMES.get(given, given)
        if name in kinds:
            _check_setting(name, kinds[name], setting, limits)
        elif given != "normalize_scores":
            raise RequestError(422, f"request: generation must hold settings of GenerationConfig, got {given[:80]!r}")
    return dict(value)


def _check_setting(name: str, kind: str, value: Any, limits: Limits) -> None:
    if value is None and "None" in kind:
        return
    base = kind.partition("|")[0].strip()
    expected = _TYPES.get(base, (str,))
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        raise RequestError(422, f"request: setting {name} must be {kind}, got {type(value).__name__}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        most = limits.settings.get(name, 2**31 - 1)
        if not abs(value) <= most:  # NaN is not
            raise RequestError(422, f"request: setting {name} must be at most {most}, got {str(value)[:40]}")


def check_plain(name: str, value: Any, limits: Limits) -> None:
    """A column of text, numbers or lists of them. Raises RequestError (422) when it is too large or too deep."""
    size = _size(value, limits.characters, 0)
    if size > limits.characters:
        raise RequestError(
            422, f"request: column {name[:80]!r} must have at most {limits.characters} characters in all"
        )


def _size(value: Any, most: int, depth: int) -> int:
    """Characters of the texts in it, an entry at least one; it stops counting above `most`."""
    if isinstance(value, str):
        return max(1, len(value))
    if depth == _DEEPEST:
        return most + 1
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if not isinstance(value, list):
        return 1
    total = len(value)
    for entry in value if total <= most else ():
        total += _size(entry, most, depth + 1)
        if total > most:
            break
    return total

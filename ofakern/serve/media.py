"""Images, sounds, videos and motions of a request: from base64, an upload, a file of the folder or a URL to what a row
may hold.

Nothing of a request reaches the library as a path: a text where an image stands is base64 or a `data:` URL and nothing
else. Formats are a short list of Pillow's (some of its others run programs), and sizes are read from headers before
anything is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ofakern.instruction import Modality
from ofakern.plan import Plan, PlanSlot
from ofakern.serve.errors import RequestError
from ofakern.serve.fetch import fetch
from ofakern.serve.request import Limits, check_plain

__all__ = ["read_row"]

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_ANIMATED = ("GIF", "WEBP", "PNG")
_SOURCES = ("base64", "file", "url")


def read_row(plan: Plan, data: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """The row of a request for a plan.

    data: by column; a value is plain JSON, or for media base64 text, bytes (an upload), `{"base64": text}`,
        `{"file": name}`, `{"url": address}`, or a list of these.

    Raises RequestError: 404 for a file that is not in the folder, 413 for media that are too large, 415 for a format
    that is not read, 422 for anything else.
    """
    slots = {slot.name: slot for slot in plan.slots if slot.name}
    unknown = sorted(set(data) - set(slots))
    if unknown:
        known = ", ".join(sorted(slots))
        raise RequestError(
            422, f"request: data must hold columns of the instruction ({known}), got {unknown[0][:80]!r}"
        )
    reader = _Reader(limits)
    return {name: reader.column(slots[name], value) for name, value in data.items()}


class _Reader:
    """Reads the columns of one request and counts its media."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._left = limits, limits.media

    def column(self, slot: PlanSlot, value: Any) -> Any:
        if value is None:
            return None
        if slot.modality not in _DECODERS:
            return self._plain(slot.name, value)
        where = f"request: column {slot.name[:80]!r}"
        if slot.group is not None and isinstance(value, list):
            return [self._value(f"{where}[{place}]", slot.modality, one) for place, one in enumerate(value)]
        return self._value(where, slot.modality, value)

    def _value(self, where: str, modality: Modality, value: Any) -> Any:
        if modality is Modality.VIDEO and isinstance(value, list):  # its frames
            return [self._media(f"{where}[{place}]", _image, one) for place, one in enumerate(value)]
        return self._media(where, _DECODERS[modality], value)

    def _plain(self, name: str, value: Any) -> Any:
        if isinstance(value, (bytes, list)) and _holds_bytes(value):
            raise RequestError(422, f"request: column {name[:80]!r} must be text or numbers, got an uploaded file")
        check_plain(name, value, self._limits)
        return value

    def _media(self, where: str, decode: Callable[[bytes, str, Limits], Any], value: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise RequestError(
                413, f"request: images, sounds and videos must be at most {self._limits.media}, got more"
            )
        if decode is _motion and isinstance(value, str) and value.lstrip().startswith("HIERARCHY"):
            return value
        return decode(self._bytes(where, value), where, self._limits)

    def _bytes(self, where: str, value: Any) -> bytes:
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            return _from_base64(value, where)
        if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in _SOURCES:
            ((source, text),) = value.items()
            if isinstance(text, str):
                read = {"base64": self._base64, "file": self._file, "url": self._url}[source]
                return read(text, where)
        raise RequestError(
            422, f'{where} must be base64 text, an upload, {{"file": name}} or {{"url": address}}, got {_shown(value)}'
        )

    def _base64(self, text: str, where: str) -> bytes:
        return _from_base64(text, where)

    def _file(self, name: str, where: str) -> bytes:
        path = None if self._limits.files is None else _inside(self._limits.files, name)
        if path is None:
            place = "no folder is served" if self._limits.files is None else "it is not in the served folder"
            raise RequestError(404, f"{where} must be a file of the server, got {name[:80]!r}: {place}")
        try:
            if path.stat().st_size > self._limits.body:
                raise RequestError(413, f"{where} must have at most {self._limits.body} bytes, got {name[:80]!r}")
            return path.read_bytes()
        except OSError as error:
            raise RequestError(404, f"{where} must be a readable file, got {name[:80]!r}") from error

    def _url(self, address: str, where: str) -> bytes:
        if not self._limits.urls:
            raise RequestError(422, f"{where} must be sent, got a URL: this server fetches none")
        return fetch(address, where, most=self._limits.body, seconds=self._limits.seconds)


def _inside(folder: Path, name: str) -> Path | None:
    """The file `name` below `folder`, links followed; None when it is not there or not below it."""
    try:
        root = folder.resolve()
        path = (root / name).resolve()
        return path if path.is_relative_to(root) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # names with zero bytes, too long ones, rings of links
        return None


def _from_base64(text: str, where: str) -> bytes:
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise RequestError(422, f"{where} must be base64 text, got another data: URL")
    try:
        data = base64.b64decode(text.strip().replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(422, f"{where} must be base64 text, got {_shown(text)}") from error
    if not data:
        raise RequestError(422, f"{where} must not be empty, got no bytes")
    return data


def _image(data: bytes, where: str, limits: Limits) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise RequestError(
            415, f"{where} must be an image ({', '.join(_FORMATS)}), got {len(data)} bytes of no such format"
        ) from error
    except Image.DecompressionBombError as error:
        raise RequestError(413, f"{where} must have at most {limits.pixels} pixels, got far more") from error
    except Exception as error:  # plugins raise almost anything on damaged files
        raise RequestError(422, f"{where} must be a readable image, got {len(data)} bytes: {error}") from error
    _check_pixels(image.width, image.height, where, limits)
    return image


def _check_pixels(width: int, height: int, where: str, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise RequestError(413, f"{where} must have at most {limits.pixels} pixels, got {width} x {height}")


def _sound(data: bytes, where: str, limits: Limits) -> bytes:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise RequestError(
            422, f"{where} must not be a sound, got one: this server has no soundfile to read it"
        ) from error
    try:
        about = soundfile.info(io.BytesIO(data))
    except (RuntimeError, TypeError, ValueError) as error:
        raise RequestError(415, f"{where} must be a sound file, got {len(data)} bytes: no known format") from error
    if about.frames * about.channels > limits.samples:
        raise RequestError(
            413, f"{where} must have at most {limits.samples} samples, got {about.frames} in {about.channels} channels"
        )
    return data


def _video(data: bytes, where: str, limits: Limits) -> bytes:
    """The file itself; its frames' size and number are read first. Pillow reads animated images, PyAV the rest."""
    try:
        with Image.open(io.BytesIO(data), formats=_ANIMATED) as image:
            _check_pixels(image.width, image.height, where, limits)
            _check_frames(image, where, limits)
    except UnidentifiedImageError:
        _check_container(data, where, limits)
    except Image.DecompressionBombError as error:
        raise RequestError(413, f"{where} must have at most {limits.pixels} pixels a frame, got far more") from error
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(422, f"{where} must be a readable video, got {len(data)} bytes: {error}") from error
    return data


def _check_frames(image: Image.Image, where: str, limits: Limits) -> None:
    try:
        image.seek(limits.frames)
    except EOFError:
        return
    raise RequestError(413, f"{where} must have at most {limits.frames} frames, got more")


def _check_container(data: bytes, where: str, limits: Limits) -> None:
    try:
        av: Any = import_module("av")
    except ImportError as error:
        raise RequestError(422, f"{where} must be images, got a video: this server has no PyAV") from error
    try:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            size = int(stream.width), int(stream.height)
            # What a header says of their number need not be true.
            count = sum(1 for _ in islice(container.demux(stream), limits.frames + 2))
    except Exception as error:
        raise RequestError(415, f"{where} must be a video file, got {len(data)} bytes: no known format") from error
    _check_pixels(*size, where, limits)
    if count > limits.frames + 1:  # the last packet is empty
        raise RequestError(413, f"{where} must have at most {limits.frames} frames, got more")


def _motion(data: bytes, where: str, limits: Limits) -> str:
    text = data.decode("utf-8", "replace")
    if not text.lstrip().startswith("HIERARCHY"):
        raise RequestError(415, f"{where} must be a BVH file, got {len(data)} bytes that do not begin with HIERARCHY")
    return text


_DECODERS: Mapping[Modality, Callable[[bytes, str, Limits], Any]] = {
    Modality.IMAGE: _image,
    Modality.AUDIO: _sound,
    Modality.VIDEO: _video,
    Modality.MOTION: _motion,
}


def _holds_bytes(value: bytes | Sequence[Any]) -> bool:
    return isinstance(value, bytes) or any(isinstance(one, bytes) for one in value)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    return type(value).__name__

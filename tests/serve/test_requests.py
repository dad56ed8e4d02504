"""What a request may hold: fields, settings, sizes, and media from base64, uploads, files and URLs."""

from __future__ import annotations

import base64
import io
import struct
import wave
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ofakern.errors import OfakernValueError
from ofakern.plan import build_plan
from ofakern.serve.errors import RequestError
from ofakern.serve.media import read_row
from ofakern.serve.request import Limits, parse_json, read_ask

LIMITS = Limits(body=200_000, pixels=10_000, samples=20_000, characters=100, media=3, frames=5, answers=4)
PLAN = build_plan("[IMAGE:img] [TEXT:q] [AUDIO:wav] [VIDEO:v] [MOTION:m] [STRUCT:table] -> [TEXT:a]")
GROUP = build_plan("([IMAGE:img] [TEXT:q])* -> [TEXT:a]")


def png(width: int = 8, height: int = 6, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes whose header says so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def wav(samples: int = 1600) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(16000)
        writer.writeframes(np.zeros(samples, "<i2").tobytes())
    return file.getvalue()


def film(frames: int) -> bytes:
    file = io.BytesIO()
    first, *rest = (Image.new("RGB", (8, 6), (40 * place, 0, 0)) for place in range(frames))
    first.save(file, "GIF", save_all=True, append_images=rest)
    return file.getvalue()


def clip(frames: int) -> bytes:
    """An MPEG-4 file."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 32, 32
        for place in range(frames):
            picture = np.full((32, 32, 3), 20 * place, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def status(data: dict[str, Any], limits: Limits = LIMITS, plan: Any = PLAN) -> int:
    with pytest.raises(RequestError) as caught:
        read_row(plan, data, limits)
    assert str(caught.value).startswith("request: ")
    return caught.value.status


# ---------------------------------------------------------------------------------------------------------- fields


def test_a_whole_request() -> None:
    body = {"instruction": "caption", "data": {"a": 1}, "closed_set": ["x"], "generation": {"beam": 3}, "stream": True}
    ask = read_ask(body, LIMITS)
    assert (ask.instruction, ask.data, ask.closed_set) == ("caption", {"a": 1}, ("x",))
    assert ask.generation == {"beam": 3} and ask.stream
    least = read_ask({"instruction": "caption"}, LIMITS)
    assert least.data == {} and least.closed_set is None and least.generation == {} and not least.stream


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ([], 400),
        ("caption", 400),
        ({}, 400),
        ({"instruction": 3}, 400),
        ({"instruction": "  "}, 400),
        ({"instruction": "x" * 101}, 422),
        ({"instruction": "caption", "beams": 3}, 400),
        ({"instruction": "caption", "data": [1]}, 400),
        ({"instruction": "caption", "stream": 1}, 400),
        ({"instruction": "caption", "closed_set": "yes"}, 400),
        ({"instruction": "caption", "closed_set": [1]}, 400),
        ({"instruction": "caption", "closed_set": []}, 422),
        ({"instruction": "caption", "closed_set": ["a"] * 5}, 422),
        ({"instruction": "caption", "closed_set": ["a" * 101]}, 422),
        ({"instruction": "caption", "generation": 3}, 400),
        ({"instruction": "caption", "generation": {"speed": 3}}, 422),
        ({"instruction": "caption", "generation": {"num_beams": "3"}}, 422),
        ({"instruction": "caption", "generation": {"num_beams": True}}, 422),
        ({"instruction": "caption", "generation": {"beam_size": 17}}, 422),
        ({"instruction": "caption", "generation": {"temperature": "hot"}}, 422),
        ({"instruction": "caption", "generation": {"temperature": None}}, 422),
        ({"instruction": "caption", "generation": {"temperature": 1e999}}, 422),
        ({"instruction": "caption", "generation": {"do_sample": 1}}, 422),
        ({"instruction": "caption", "generation": {"seed": 10**30}}, 422),
        ({"instruction": "caption", "generation": {"temperature": 10**400}}, 422),
    ],
)
def test_wrong_fields(body: Any, code: int) -> None:
    with pytest.raises(RequestError) as caught:
        read_ask(body, LIMITS)
    assert caught.value.status == code and str(caught.value).startswith("request: ")


@pytest.mark.parametrize(
    "text", ["", "{", "NaN", '{"a": Infinity}', "[" * 100_000, b"\xff\xfe", "1" * 10_000, '"\\ud800"', b'["\\ud800"]']
)
def test_what_is_no_json(text: str | bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_json(text, "body")
    assert caught.value.status == 400 and len(str(caught.value)) < 400


@pytest.mark.parametrize("change", [{"body": 0}, {"pixels": -1}, {"seconds": 0}, {"files": Path("/nowhere/at/all")}])
def test_limits_must_make_sense(change: dict[str, Any]) -> None:
    with pytest.raises(OfakernValueError, match="serve: "):
        Limits(**change)


# ----------------------------------------------------------------------------------------------------------- media


def test_frames_of_a_video_file_are_counted() -> None:
    assert read_row(PLAN, {"v": clip(5)}, LIMITS)["v"]
    assert status({"v": clip(7)}) == 413


def test_an_image_comes_in_many_ways(tmp_path: Path) -> None:
    data = png()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    limits = Limits(files=tmp_path)
    for value in (data, text, f"data:image/png;base64,{text}", {"base64": text}, {"file": "inner/a.png"}):
        image = read_row(PLAN, {"img": value, "q": "what?"}, limits)["img"]
        assert image.size == (8, 6) and image.convert("RGB").getpixel((0, 0)) == (0, 0, 0)
    images = read_row(GROUP, {"img": [data, text], "q": ["a", "b"]}, limits)["img"]
    assert [image.size for image in images] == [(8, 6)] * 2


def test_sounds_videos_and_motions() -> None:
    assert read_row(PLAN, {"wav": wav()}, LIMITS)["wav"] == wav()
    assert read_row(PLAN, {"v": film(5)}, LIMITS)["v"] == film(5)
    frames = read_row(PLAN, {"v": [png(), png(4, 4)]}, LIMITS)["v"]
    assert [frame.size for frame in frames] == [(8, 6), (4, 4)]
    motion = "HIERARCHY\nROOT hips\n"
    assert read_row(PLAN, {"m": motion}, LIMITS)["m"] == motion
    assert read_row(PLAN, {"m": motion.encode()}, LIMITS)["m"] == motion


def test_plain_columns_stay_as_they_are() -> None:
    row = {"q": "what?", "table": [["a", 1], ["b", 2.5]], "a": None}
    assert read_row(PLAN, row, LIMITS) == row


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ({"image": "x"}, 422),
        ({"img": "/etc/passwd"}, 422),
        ({"img": "../../etc/passwd"}, 422),
        ({"img": "photo.png"}, 422),
        ({"img": 3}, 422),
        ({"img": ""}, 422),
        ({"img": {"path": "/etc/passwd"}}, 422),
        ({"img": {"bytes": "x"}}, 422),
        ({"img": {"file": "a.png", "url": "x"}}, 422),
        ({"img": {"file": 3}}, 422),
        ({"img": {"file": "a.png"}}, 404),
        ({"img": {"url": "http://example.com/a.png"}}, 422),
        ({"img": "data:image/svg+xml,<svg/>"}, 422),
        ({"img": b"no image at all"}, 415),
        ({"img": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, 415),
        ({"img": png(101, 100)}, 413),
        ({"img": png_that_claims(50_000, 50_000)}, 413),
        ({"img": png_that_claims(2**31 - 1, 2**31 - 1)}, 413),
        ({"img": [png()]}, 422),  # the column of no group
        ({"v": [png()] * 4}, 413),
        ({"v": [b"%!PS-Adobe-3.0"]}, 415),
        ({"v": [[png()]]}, 422),
        ({"v": film(6)}, 413),
        ({"wav": b"no sound"}, 415),
        ({"wav": "/etc/passwd"}, 422),
        ({"wav": {"array": [0.0], "sampling_rate": 1}}, 422),
        ({"wav": wav(20_001)}, 413),
        ({"v": b"no video"}, 415),
        ({"v": "/etc"}, 415),  # it is base64 of three bytes
        ({"v": png_that_claims(50_000, 50_000)}, 413),
        ({"m": "/etc/passwd"}, 422),
        ({"m": b"no motion"}, 415),
        ({"q": b"an upload"}, 422),
        ({"q": "x" * 101}, 422),
        ({"q": {"a": ["x" * 60, "y" * 60]}}, 422),
        ({"table": [[0] * 60] * 2}, 422),
        ({"table": [[[[[[[[[[]]]]]]]]]]}, 422),
    ],
)
def test_what_is_refused(data: dict[str, Any], code: int) -> None:
    assert status(data) == code


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "link.png", "inner/../../secret.png", "a\0b", "x" * 5000, ".", "", "ring"]
)
def test_files_come_from_the_folder_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    folder = tmp_path / "served"
    (folder / "inner").mkdir(parents=True)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "ring").symlink_to(folder / "ring")
    assert status({"img": {"file": name}}, Limits(files=folder)) == 404


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\0" * 300_000)
    assert status({"img": {"file": "a.png"}}, Limits(body=200_000, files=tmp_path)) == 413

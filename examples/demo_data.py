"""The demonstration's three data sets as plain rows: sequences of dicts that hold PIL images, texts and boxes.

Every training row is a pure function of its index, so any order of access, any number of passes and a resumed run see
the same rows. Test rows are the sets' own test splits, untouched.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, overload

import numpy as np
from demo_scenes import CARD_CLASSES, CardPhoto, SceneMaker, card_photo
from PIL import Image, ImageEnhance

__all__ = [
    "CARD_CLASSES",
    "DATA",
    "Row",
    "Rows",
    "answers",
    "caption_rows",
    "captions",
    "card_photos",
    "grounding_rows",
    "question_rows",
    "questions",
]

DATA = Path(__file__).resolve().parent / "data"
Row = dict[str, Any]


class Rows(Sequence[Row]):
    """`length` rows, made when they are asked for; `make(i)` must depend on nothing but `i`."""

    def __init__(self, length: int, make: Callable[[int], Row]) -> None:
        self._length = length
        self._make = make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            chosen = range(self._length)[index]
            return Rows(len(chosen), lambda i: self._make(chosen[i]))
        if not -self._length <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        return self._make(index % self._length)

    def __iter__(self) -> Iterator[Row]:
        return (self._make(i) for i in range(self._length))


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@cache
def _pictures(name: str) -> dict[str, bytes]:
    """Every file of a set's `images.zip`, still encoded."""
    with zipfile.ZipFile(DATA / name / "images.zip") as archive:
        return {member: archive.read(member) for member in archive.namelist()}


def _opened(name: str, member: str) -> Image.Image:
    """The picture in RGB; transparent pixels become white."""
    encoded = Image.open(io.BytesIO(_pictures(name)[member]))
    if encoded.mode == "RGB":
        return encoded.copy()
    picture = encoded.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _square(picture: Image.Image, size: int) -> Image.Image:
    return picture.resize((size, size), Image.Resampling.BICUBIC)


def _varied_emoji(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Shifted, scaled and recoloured a little; not mirrored, because names say left and right."""
    side = max(picture.size)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    zoom = rng.uniform(0.85, 1.15)
    shift_x, shift_y = rng.uniform(-0.08, 0.08, 2) * side
    centre = side / 2 * (1 - zoom)
    coefficients = (zoom, 0.0, centre + shift_x, 0.0, zoom, centre + shift_y)
    moved = canvas.transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor="white"
    )
    return ImageEnhance.Color(moved).enhance(rng.uniform(0.7, 1.3))


def caption_rows(split: str, *, size: int = 72, seed: int = 0, passes: int = 1) -> Rows:
    """noto_emoji: `img`, `cap` (its English name, lower case).

    Training rows, `size` x `size` pixels, repeat `passes` times and are varied anew each time.
    """
    records = [r for r in _lines(DATA / "noto_emoji" / "annotations.jsonl") if r["split"] == split]

    def make(i: int) -> Row:
        record = records[i % len(records)]
        picture = _opened("noto_emoji", record["file"])
        if split == "train":
            picture = _square(_varied_emoji(picture, np.random.default_rng((seed, 1, i))), size)
        return {"img": picture, "cap": record["en"].lower()}

    return Rows(len(records) * passes, make)


def captions(split: str) -> list[str]:
    """The captions of a split, without their pictures."""
    return [r["en"].lower() for r in _lines(DATA / "noto_emoji" / "annotations.jsonl") if r["split"] == split]


def answers() -> tuple[str, ...]:
    """The closed set of easy_vqa's answers, in alphabetical order."""
    return tuple(sorted((DATA / "easy_vqa" / "answers.txt").read_text(encoding="utf-8").split()))


def questions(split: str) -> list[tuple[str, str, str]]:
    """(picture, question, answer) of every question of a split of easy_vqa."""
    head, *lines = _lines(DATA / "easy_vqa" / "questions.jsonl")
    return [
        (line["file"], head["questions"][q], head["answers"][a])
        for line in lines
        if line["file"].startswith(f"{split}/")
        for q, a in line["qa"]
    ]


def question_rows(split: str, *, size: int = 64, seed: int = 0, length: int = 1) -> Rows:
    """easy_vqa: `img`, `question`, `answer`.

    Training draws `length` rows of `size` x `size` pixels, mirrored at random (which changes no answer): a third each
    of questions answered by yes or no, a shape, a colour. Three in four questions of the set are answered by yes or no,
    mostly without a look at the picture; what colours and shapes are is learnt from the others.
    """
    records = questions(split)
    if split == "test":
        return Rows(len(records), lambda i: _question(records[i]))
    kinds = [[r for r in records if r[2] in kind] for kind in _answer_kinds()]

    def make(i: int) -> Row:
        rng = np.random.default_rng((seed, 3, i))
        kind = kinds[int(rng.integers(len(kinds)))]
        row = _question(kind[int(rng.integers(len(kind)))])
        picture = _square(row["img"], size)
        return row | {"img": picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture}

    return Rows(length, make)


def _question(record: tuple[str, str, str]) -> Row:
    member, question, answer = record
    return {"img": _opened("easy_vqa", member), "question": question, "answer": answer}


def _answer_kinds() -> tuple[set[str], set[str], set[str]]:
    """Yes and no, shapes, colours."""
    truth, shapes = {"yes", "no"}, {"circle", "rectangle", "triangle"}
    return truth, shapes, set(answers()) - truth - shapes


@cache
def card_photos(split: str) -> tuple[CardPhoto, ...]:
    """The photographs of a split of playing_cards."""
    return tuple(
        card_photo(_opened("playing_cards", r["file"]), [(b[0], tuple(b[1:])) for b in r["boxes"]])
        for r in _lines(DATA / "playing_cards" / "boxes.jsonl")
        if r["split"] == split
    )


def grounding_rows(split: str, *, size: int = 224, seed: int = 0, length: int = 1) -> Rows:
    """playing_cards: `img`, `card` (a class that one card of the picture has), `box` (its x0, y0, x1, y1 in pixels).

    Testing uses the photos of the test split and every class that occurs once in its photo: with two queens in sight
    "queen" has no single answer. Training draws `length` rows of `size` x `size` pixels, each a varied training photo
    or a scene composed of cards cut from the training photos.
    """
    photos = card_photos(split)
    if split == "train":
        maker = SceneMaker(photos, size)
        return Rows(length, lambda i: maker.row(np.random.default_rng((seed, 2, i))))
    queries = [(photo, name, box) for photo in photos for name, box in photo.single_cards()]

    def make(i: int) -> Row:
        photo, name, box = queries[i]
        return {"img": photo.picture, "card": name, "box": box}

    return Rows(len(queries), make)

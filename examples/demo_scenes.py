"""Training pictures for grounding: varied photographs of playing cards, and scenes composed of cards cut from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

__all__ = ["CARD_CLASSES", "CardPhoto", "SceneMaker", "card_photo"]

CARD_CLASSES = ("ace", "jack", "king", "nine", "queen", "ten")
Box = tuple[float, float, float, float]
Labelled = tuple[str, Box]

# A card is 2.5 x 3.5 inches. A box of about that shape holds a card that lies straight and is whole, so the cut has no
# background in its corners.
_CARD_SHAPE = (0.62, 0.82)


@dataclass(frozen=True)
class CardPhoto:
    """One photograph and its labelled boxes in pixels."""

    picture: Image.Image
    boxes: tuple[Labelled, ...]

    def single_cards(self) -> list[Labelled]:
        """The cards whose class occurs once here, so that the class name has one answer."""
        return _single(self.boxes)


def card_photo(picture: Image.Image, boxes: Sequence[Labelled]) -> CardPhoto:
    """The photo with its boxes cut to it (a few reach past the edge by a rounding)."""
    return CardPhoto(picture, tuple((name, _cut(box, picture.width, picture.height)) for name, box in boxes))


def _cut(box: Box, width: int, height: int) -> Box:
    return (max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height)))


def _single(boxes: Sequence[Labelled]) -> list[Labelled]:
    counts = Counter(name for name, _ in boxes)
    return [(name, box) for name, box in boxes if counts[name] == 1]


def _scaled(box: Box, x: float, y: float) -> Box:
    return (box[0] * x, box[1] * y, box[2] * x, box[3] * y)


def _resized(picture: Image.Image, box: Box, size: int) -> tuple[Image.Image, Box]:
    """The picture stretched to `size` x `size` and the box with it."""
    scaled = _cut(_scaled(box, size / picture.width, size / picture.height), size, size)
    return picture.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0), scaled


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def _overlap(a: Box, b: Box) -> float:
    return _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))


def _turned(
    picture: Image.Image, boxes: Sequence[Labelled], rng: np.random.Generator
) -> tuple[Image.Image, list[Labelled]]:
    """Mirrored along either axis at random, and now and then transposed."""
    turned = list(boxes)
    width, height = picture.size
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        turned = [(n, (width - b[2], b[1], width - b[0], b[3])) for n, b in turned]
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        turned = [(n, (b[0], height - b[3], b[2], height - b[1])) for n, b in turned]
    if rng.random() < 0.2:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
        turned = [(n, (b[1], b[0], b[3], b[2])) for n, b in turned]
    return picture, turned


def _recoloured(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.7, 1.3))
    picture = ImageEnhance.Contrast(picture).enhance(rng.uniform(0.75, 1.25))
    return ImageEnhance.Color(picture).enhance(rng.uniform(0.6, 1.4))


def _window(width: int, height: int, smallest: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A random window whose sides are at least `smallest` of the picture's."""
    w = int(width * rng.uniform(smallest, 1.0))
    h = int(height * rng.uniform(smallest, 1.0))
    x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    return x, y, x + w, y + h


def _cropped(
    picture: Image.Image, boxes: Sequence[Labelled], rng: np.random.Generator
) -> tuple[Image.Image, list[Labelled]]:
    """A random window that keeps every card whole; the uncropped picture when eight draws find none."""
    for _ in range(8):
        window = _window(*picture.size, 0.6, rng)
        x0, y0, x1, y1 = window
        if all(x0 <= b[0] and y0 <= b[1] and b[2] <= x1 and b[3] <= y1 for _, b in boxes):
            return picture.crop(window), [(n, (b[0] - x0, b[1] - y0, b[2] - x0, b[3] - y0)) for n, b in boxes]
    return picture, list(boxes)


class SceneMaker:
    """Draws grounding rows of `size` x `size` pixels from training photos.

    photos: the training split. plain, composed: the parts of the rows that are one card on a plain colour (from which
    a new model learns soonest what a position is) and several cards on a piece of a photo; the rest are photos,
    cropped, mirrored and recoloured. Rows are dicts with `img`, `card` and `box` (pixels of `img`).
    """

    def __init__(self, photos: Sequence[CardPhoto], size: int, *, plain: float = 0.3, composed: float = 0.3) -> None:
        self._size = size
        self._plain = plain
        self._composed = composed
        self._photos = [photo for photo in photos if photo.single_cards()]
        self._grounds = list(photos)
        self._cards: dict[str, list[Image.Image]] = {name: [] for name in CARD_CLASSES}
        for photo in photos:
            for name, box in photo.boxes if len(photo.boxes) == 1 else ():
                if _CARD_SHAPE[0] <= (box[2] - box[0]) / (box[3] - box[1]) <= _CARD_SHAPE[1]:
                    self._cards[name].append(photo.picture.crop(box))

    def row(self, rng: np.random.Generator) -> dict[str, Any]:
        """One row; it depends on nothing but the generator's state."""
        while True:
            kind = rng.random()
            if kind < self._plain:
                picture, boxes = self._scene(rng, self._plain_ground(rng), 1)
            elif kind < self._plain + self._composed:
                count = int(rng.choice([1, 2, 3, 4], p=[0.4, 0.3, 0.15, 0.15]))
                picture, boxes = self._scene(rng, self._ground(rng), count)
            else:
                picture, boxes = self._photo(rng)
            named = _single(boxes)
            if named:
                break
        name, box = named[int(rng.integers(len(named)))]
        picture, box = _resized(picture, box, self._size)
        return {"img": _recoloured(picture, rng), "card": name, "box": box}

    def _photo(self, rng: np.random.Generator) -> tuple[Image.Image, list[Labelled]]:
        photo = self._photos[int(rng.integers(len(self._photos)))]
        return _turned(*_cropped(photo.picture, photo.boxes, rng), rng)

    def _ground(self, rng: np.random.Generator) -> Image.Image:
        """A piece of a training photo without a card in it, enlarged to a whole picture."""
        while True:
            photo = self._grounds[int(rng.integers(len(self._grounds)))]
            for _ in range(12):
                window = _window(*photo.picture.size, 0.25, rng)
                edges = (float(window[0]), float(window[1]), float(window[2]), float(window[3]))
                if not any(_overlap(edges, box) for _, box in photo.boxes):
                    side = 2 * self._size
                    return photo.picture.crop(window).resize((side, side), Image.Resampling.BILINEAR)

    def _plain_ground(self, rng: np.random.Generator) -> Image.Image:
        red, green, blue = (int(v) for v in rng.integers(0, 170, 3))
        return Image.new("RGB", (2 * self._size, 2 * self._size), (red, green, blue))

    def _scene(self, rng: np.random.Generator, ground: Image.Image, count: int) -> tuple[Image.Image, list[Labelled]]:
        """At most `count` cards of different classes on `ground`; none hides much of an earlier one."""
        side = ground.width
        boxes: list[Labelled] = []
        scale = rng.uniform(0.25, 0.5)
        for name in rng.permutation(CARD_CLASSES)[:count]:
            card = self._posed(str(name), scale * rng.uniform(0.85, 1.15) * side, rng)
            room_x, room_y = side - card.width, side - card.height
            if room_x <= 0 or room_y <= 0:
                continue
            x, y = int(rng.integers(room_x)), int(rng.integers(room_y))
            box = (float(x), float(y), float(x + card.width), float(y + card.height))
            if any(_overlap(box, other) > 0.35 * _area(other) for _, other in boxes):
                continue
            ground.paste(card.convert("RGB"), (x, y), card.getchannel("A"))
            boxes.append((str(name), box))
        return ground, boxes

    def _posed(self, name: str, length: float, rng: np.random.Generator) -> Image.Image:
        """One card (RGBA) whose long side is `length` pixels: turned, tilted, stretched, trimmed to what shows."""
        cards = self._cards[name]
        card = cards[int(rng.integers(len(cards)))]
        width, height = length * 0.714 * rng.uniform(0.9, 1.3), length
        card = card.resize((max(round(width), 4), max(round(height), 4)), Image.Resampling.BILINEAR, reducing_gap=2.0)
        angle = rng.choice([0.0, 90.0, 180.0, 270.0], p=[0.4, 0.1, 0.4, 0.1])
        if rng.random() < 0.6:
            angle += rng.uniform(-30.0, 30.0)
        turned = card.convert("RGBA").rotate(angle, Image.Resampling.BILINEAR, expand=True)
        return turned.crop(turned.getchannel("A").getbbox())

"""What an inference returns for one sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ofakern.errors import DataError
from ofakern.modality.audio.postprocess import Speech
from ofakern.modality.motion.picture import save_animation, save_strip
from ofakern.modality.motion.skeleton import Motion

__all__ = ["Output"]

Box = tuple[float, float, float, float]
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


@dataclass
class Output:
    """One answer of a model.

    text: the decoded text, when the target has a text slot. box: x0, y0, x1, y1 in pixels of the original image, when
    it has a box slot; boxes: all of them, when there are several. image: the sample's image (PIL, original size), or
    the picture that was made, when the target is an IMAGE slot. motion: the motion that was made, when it is a MOTION
    slot.
    speech: the written speech, when the target is an AUDIO slot (`.waveform()`, `.save_audio(path)`, ...).
    score: log-probability of the answer. tokens: vocabulary indices without the begin token. token_log_probs: of each
    of them, as the search saw it.
    values: every target slot's value by its name (a list for a slot of a repeated group).
    """

    text: str | None = None
    box: Box | None = None
    image: Image.Image | None = None
    score: float | None = None
    tokens: list[int] = field(default_factory=list)
    token_log_probs: list[float] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    speech: Speech | None = None
    motion: Motion | None = None

    def save_image(self, path: str | Path) -> None:
        """Writes the image; the format follows the file's suffix. Raises DataError when there is none."""
        self._image("save_image").save(path)

    def save_motion(self, path: str | Path) -> None:
        """Writes the motion: a BVH file, an animation (.gif) or a strip of poses (.png, .svg, .pdf).

        Raises DataError when there is none, or for another suffix; OfakernRuntimeError for pictures without matplotlib.
        """
        if self.motion is None:
            raise DataError("Output.save_motion: output must have a motion, got none")
        suffix = Path(path).suffix.lower()
        if suffix == ".bvh":
            self.motion.write(path)
        elif suffix == ".gif":
            save_animation(self.motion, path)
        elif suffix in (".png", ".svg", ".pdf"):
            save_strip(self.motion, path)
        else:
            raise DataError(f"Output.save_motion: path must end in .bvh, .gif, .png, .svg or .pdf, got {str(path)!r}")

    def save_box(self, path: str | Path, label: str | None = None) -> None:
        """Writes the image with the box (all boxes) drawn on it. Raises DataError when there is no box or no image."""
        self.draw_box(label).save(path)

    def draw_box(self, label: str | None = None) -> Image.Image:
        """A copy of the image with the box (all boxes) drawn on it, and `label` at the first."""
        boxes: Sequence[Box] = self.boxes or ([] if self.box is None else [self.box])
        if not boxes:
            raise DataError("Output.draw_box: output must have a box, got none")
        drawn = self._image("draw_box").convert("RGB").copy()
        pen = ImageDraw.Draw(drawn)
        width = max(1, round(max(drawn.size) / 150))
        for number, box in enumerate(boxes):
            pen.rectangle(box, outline=_COLOURS[number % len(_COLOURS)], width=width)
        if label:
            _write_label(pen, label, boxes[0], max(10, round(max(drawn.size) / 30)))
        return drawn

    def spoken(self, where: str = "Output.spoken") -> Speech:
        """The written speech. Raises DataError when there is none."""
        if self.speech is None:
            raise DataError(f"{where}: output must have speech, got none")
        return self.speech

    def _image(self, method: str) -> Image.Image:
        if self.image is None:
            raise DataError(f"Output.{method}: output must have an image, got none")
        return self.image


def _write_label(pen: ImageDraw.ImageDraw, label: str, box: Box, size: int) -> None:
    font = ImageFont.load_default(size)
    place = (box[0], max(0.0, box[1] - size * 1.3))
    pen.rectangle(pen.textbbox(place, label, font=font), fill=_COLOURS[0])
    pen.text(place, label, fill="white", font=font)

"""The demonstration's pictures: a sheet of held-out samples with the model's answers, and the loss curves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

__all__ = ["Shown", "draw_loss_curves", "draw_sheet"]

Box = Sequence[float]

_PICTURE = 208
_CELL = (300, 342)
_INK, _FAINT, _RIGHT, _WRONG = "#1b1b1b", "#6b6b6b", "#2a7d3f", "#b3261e"


@dataclass(frozen=True)
class Shown:
    """One sample of the sheet; boxes are in pixels of the picture. good: whether the answer counts as right."""

    picture: Image.Image
    instruction: str
    answer: str
    truth: str
    good: bool
    box: Box | None = None
    true_box: Box | None = None


def draw_sheet(columns: Mapping[str, Sequence[Shown]], path: Path) -> None:
    """One headed column per task, two samples wide; the predicted box is solid red, the true one dashed green."""
    width, height = _CELL
    rows = max(-(-len(samples) // 2) for samples in columns.values())
    sheet = Image.new("RGB", (width * 2 * len(columns) + 20, height * rows + 60), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (heading, samples) in enumerate(columns.items()):
        left = 20 + column * 2 * width
        pen.text((left, 18), heading, font=ImageFont.load_default(20), fill=_INK)
        for number, sample in enumerate(samples):
            _draw_cell(sheet, sample, left + number % 2 * width, 56 + number // 2 * height)
    sheet.save(path)


def _draw_cell(sheet: Image.Image, sample: Shown, left: int, top: int) -> None:
    scale = _PICTURE / max(sample.picture.size)
    size = (round(sample.picture.width * scale), round(sample.picture.height * scale))
    picture = sample.picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(picture)
    if sample.true_box is not None:
        _dashed(pen, [v * scale for v in sample.true_box], _RIGHT)
    if sample.box is not None:
        pen.rectangle([v * scale for v in sample.box], outline="#ff2d20", width=3)
    sheet.paste(picture, (left, top))
    outer = ImageDraw.Draw(sheet)
    outer.rectangle((left, top, left + size[0], top + size[1]), outline="#c8c8c8")
    line = top + _PICTURE + 6
    colour = _RIGHT if sample.good else _WRONG
    for text, fill, size_px in (
        (sample.instruction, _FAINT, 12),
        (sample.answer, colour, 15),
        (f"truth: {sample.truth}", _FAINT, 12),
    ):
        for part in textwrap.wrap(text, 44 if size_px == 12 else 34) or [""]:
            outer.text((left, line), part, font=ImageFont.load_default(size_px), fill=fill)
            line += size_px + 4


def _dashed(pen: ImageDraw.ImageDraw, box: Box, colour: str, dash: int = 6) -> None:
    x0, y0, x1, y1 = (round(v) for v in box)
    for x in range(x0, x1, 2 * dash):
        for y in (y0, y1):
            pen.line((x, y, min(x + dash, x1), y), fill=colour, width=2)
    for y in range(y0, y1, 2 * dash):
        for x in (x0, x1):
            pen.line((x, y, x, min(y + dash, y1)), fill=colour, width=2)


def draw_loss_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Nats per target token over the updates, one smoothed curve per task and one of everything."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    updates = [record["update"] for record in history]
    curves = {"all": [record["nll"] for record in history]}
    for name in history[0]["tasks"]:
        curves[name] = [record["tasks"][name]["nll"] for record in history]
    figure, axes = plt.subplots(figsize=(8.0, 4.5), dpi=110)
    for name, values in curves.items():
        (line,) = axes.plot(updates, values, alpha=0.18, linewidth=0.8)
        axes.plot(updates, _smoothed(values), color=line.get_color(), linewidth=1.8, label=name)
    axes.set_xlabel("update")
    axes.set_ylabel("training loss (nats per target token)")
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _smoothed(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Exponential average, corrected for its start."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean = keep * mean + (1.0 - keep) * value
        weight = keep * weight + (1.0 - keep)
        out.append(mean / weight)
    return out

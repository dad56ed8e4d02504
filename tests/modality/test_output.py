"""The output object."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ofakern.errors import DataError
from ofakern.modality.output import Output


def test_save_box_draws_on_a_copy(tmp_path: Path) -> None:
    image = Image.new("RGB", (200, 100), "white")
    output = Output(text="a ball", box=(20.5, 10, 120, 80), image=image)
    output.save_box(tmp_path / "box.png", label="ball")
    drawn = np.array(Image.open(tmp_path / "box.png"))
    assert drawn.shape == (100, 200, 3)
    assert (drawn[40, 120] != 255).any() and (drawn[50, 160] == 255).all()
    assert np.array(image).min() == 255
    output.save_image(tmp_path / "image.jpg")
    assert Image.open(tmp_path / "image.jpg").size == (200, 100)


def test_every_box_is_drawn() -> None:
    output = Output(boxes=[(10, 10, 20, 20), (50, 50, 60, 60)], image=Image.new("L", (100, 100), 255))
    drawn = np.array(output.draw_box())
    assert (drawn[10, 10] != 255).any() and (drawn[50, 50] != 255).any()
    assert (drawn[10, 10] != drawn[50, 50]).any()


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must have a box"):
        Output(image=Image.new("RGB", (4, 4))).save_box(tmp_path / "a.png")
    with pytest.raises(DataError, match="must have an image"):
        Output(box=(0, 0, 1, 1)).save_box(tmp_path / "a.png")
    with pytest.raises(DataError, match="must have an image"):
        Output().save_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="--save-audio: output must have speech, got none"):
        Output(text="a").spoken("--save-audio")

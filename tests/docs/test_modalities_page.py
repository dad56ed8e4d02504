"""The snippets of docs/MODALITIES.md run as they stand, in a folder with the files they name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, python_blocks
from PIL import Image

from ofakern import GeneralistModel
from ofakern.checkpoint import generalist
from ofakern.modality.image.vqgan import VQGAN, VQGANConfig
from ofakern.modality.motion.skeleton import Motion
from ofakern.model.config import SIZES

REAL = ROOT / "tests" / "golden" / "real"
BLOCKS = python_blocks("docs/MODALITIES.md")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with files; models of the smallest size, on one thread, so that the page is quick."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES, "tiny", (32, 64, 4, 1, 1, "resnet50"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)


def run(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(source, "docs/MODALITIES.md", "exec"), names)
    assert isinstance(names["model"], generalist.GeneralistModel) and GeneralistModel is generalist.GeneralistModel
    return names


def test_digits_are_heard_and_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "digits").mkdir()
    for name in ("7_jackson_5.flac", "2_jackson_5.flac"):
        shutil.copy(ROOT / "examples" / "data" / "spoken_digits" / name, folder / "digits")
    run(BLOCKS[0])
    assert capsys.readouterr().out and (folder / "seven.wav").read_bytes()[:4] == b"RIFF"
    assert Image.open(folder / "seven.png").width > 300


def test_a_clip_is_described(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cars", "fruit"):
        strip = Image.open(REAL / "video" / f"{name}_0.jpg")
        frames = [strip.crop((x, 0, x + 96, 54)) for x in range(0, 768, 96)]
        (folder / name).mkdir()
        for number, frame in enumerate(frames):
            frame.save(folder / name / f"{number}.png")
        frames[0].save(folder / f"{name}.gif", save_all=True, append_images=frames[1:])
    run(BLOCKS[1])
    assert capsys.readouterr().out


def test_a_motion_is_made(folder: Path) -> None:
    shutil.copy(REAL / "motion" / "indian_04.bvh", folder / "indian.bvh")
    shutil.copy(REAL / "motion" / "martial_05.bvh", folder / "martial.bvh")
    run(BLOCKS[2])
    assert len(Motion.read(folder / "made.bvh")) == 30 and Image.open(folder / "made.png").width > 300


def test_a_picture_is_made(folder: Path) -> None:
    config = VQGANConfig(16, 8, 16, channels=32, multipliers=(1, 2), blocks=1, attention=(), latent=8)
    torch.manual_seed(0)
    torch.save({"state_dict": VQGAN(config).state_dict()}, folder / "vqgan.ckpt")
    run(BLOCKS[3])
    assert Image.open(folder / "red.png").size == (16, 16)

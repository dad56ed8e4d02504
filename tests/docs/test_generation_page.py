"""The snippets of docs/GENERATION.md run as they stand, with a small model and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pages import python_blocks, text_of
from PIL import Image

from ofakern import GeneralistModel, Task
from ofakern.generate.config import OFASYS_NAMES, GenerationConfig
from ofakern.modality.image.adaptor import ImagePatchEmbedConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig

PAGE = "docs/GENERATION.md"


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    photo = Image.new("RGB", (40, 32), "red")
    row = {"img": photo, "cap": "a red block", "q": "which?", "answer": "red", "box": "4,2,16,16", "name": "block"}
    tasks = [
        Task("caption", "[IMAGE:img] what is it? -> [TEXT:cap]"),
        Task("vqa", "[IMAGE:img] [TEXT:q] -> [TEXT:answer,closed_set]"),
        Task("grounding", "[IMAGE:img] where is [TEXT:name] ? -> [BOX:box]"),
    ]
    image = ImagePatchEmbedConfig(image_height=32, image_width=32, patch_height=8, patch_width=8)
    shape = {"dim": 32, "ffn_dim": 64, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    model = GeneralistModel.for_tasks(
        [task.add_dataset([row], "train") for task in tasks],
        image_size=32,
        vocab_size=300,
        bins=16,
        adaptors=(TextAdaptorConfig(max_position=48, bucket_size=16), image),
        **shape,
    )
    yield {"model": model, "photo": photo}
    torch.set_num_threads(before)


def test_the_snippets_run(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for block in python_blocks(PAGE):
        exec(compile(block, PAGE, "exec"), names)
    assert len(names["best"]) == 3 and names["closed"].text in ("red", "green") and len(names["answers"]) == 4
    assert names["session"].running == 0 and capsys.readouterr().out


def test_every_setting_and_name_is_there() -> None:
    text = text_of(PAGE)
    elsewhere = {"stop_threshold", "diffusion_steps", "sampler", "guidance", "frames"}  # speech and motions
    assert not [name for name in vars(GenerationConfig()) if name not in elsewhere and f"`{name}" not in text]
    own = {name for name, ours in OFASYS_NAMES.items() if ours not in elsewhere}
    assert not [name for name in own - {"max_iter"} if f"`{name}`" not in text]

"""The snippets of docs/CLOSED_SETS.md run as they stand, with a small model and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pages import python_blocks
from PIL import Image

from ofakern import GeneralistModel, Task
from ofakern.modality.image.adaptor import ImagePatchEmbedConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig

PAGE = "docs/CLOSED_SETS.md"


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    photo = Image.new("RGB", (40, 32), "red")
    task = Task("vqa", "[IMAGE:img] [TEXT:q] -> [TEXT:answer,closed_set]", closed_set=("red", "green", "dark red"))
    image = ImagePatchEmbedConfig(image_height=32, image_width=32, patch_height=8, patch_width=8)
    model = GeneralistModel.for_tasks(
        [task.add_dataset([{"img": photo, "q": "which?", "answer": "red"}], "train")],
        image_size=32,
        vocab_size=300,
        adaptors=(TextAdaptorConfig(max_position=48, bucket_size=16), image),
        dim=32,
        ffn_dim=64,
        heads=2,
        encoder_layers=1,
        decoder_layers=1,
    )
    yield {"model": model, "photo": photo}
    torch.set_num_threads(before)


def test_the_snippets_run(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for block in python_blocks(PAGE):
        exec(compile(block, PAGE, "exec"), names)
    assert capsys.readouterr().out
    scores = {one.text: one.score for one in names["every"]}
    assert sum(torch.tensor(list(scores.values())).exp().tolist()) == pytest.approx(1.0, abs=1e-4)
    assert names["answer"].text in scores and len(names["likely"]) == 2
    in_order = [scores[text] for text in ("red", "green", "dark red")]
    assert names["scores"][0].tolist() == pytest.approx(in_order, abs=1e-4)

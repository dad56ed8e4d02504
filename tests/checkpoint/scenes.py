"""Small pictures with captions, questions and boxes, and a model just large enough to learn them by heart."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageDraw

from ofakern.checkpoint import GeneralistModel
from ofakern.modality.image.adaptor import ImagePatchEmbedConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import OFAConfig
from ofakern.tasks import Task

COLOURS = ("red", "green", "blue", "yellow", "black", "purple")
SIDE = 32


def scenes() -> list[dict[str, Any]]:
    rows = []
    for number, colour in enumerate(COLOURS):
        image = Image.new("RGB", (40, 32), "white")
        x, y = 4 + 10 * (number % 3), 2 + 12 * (number // 3)
        box = (x, y, x + 12, y + 14)
        ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=colour)
        rows.append(
            {
                "img": image,
                "cap": f"a {colour} block on white ground",
                "q": "which colour is it?",
                "answer": colour,
                "box": ",".join(map(str, box)),
                "name": f"{colour} block",
            }
        )
    return rows


def tasks() -> list[Task]:
    caption = Task("caption", "[IMAGE:img] what does the image describe? -> [TEXT:cap]", micro_batch_size=6)
    question = Task("vqa", "[IMAGE:img] [TEXT:q] -> [TEXT:answer,closed_set]", micro_batch_size=6, metrics=["accuracy"])
    instruction = '[IMAGE:img] which region does the text " [TEXT:name] " describe? -> [BOX:box]'
    grounding = Task("grounding", instruction, micro_batch_size=6, metrics=["grounding"])
    return [task.add_dataset(scenes(), "train") for task in (caption, question, grounding)]


def small_config() -> OFAConfig:
    image = ImagePatchEmbedConfig(image_height=SIDE, image_width=SIDE, patch_height=8, patch_width=8)
    text = TextAdaptorConfig(max_position=64, bucket_size=16)
    return OFAConfig(
        dim=32, ffn_dim=64, heads=2, encoder_layers=1, decoder_layers=1, dropout=0.0, adaptors=(text, image)
    )


def small_model(**kwargs: Any) -> GeneralistModel:
    torch.manual_seed(0)
    return GeneralistModel(small_config(), image_size=SIDE, vocab_size=300, bins=33, **kwargs)

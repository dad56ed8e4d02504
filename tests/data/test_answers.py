"""Tokens back to values: what the Encoder put in comes out."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from ofakern.data.answers import AnswerReader
from ofakern.data.example import Encoder, PreprocessConfig, build_closed_sets
from ofakern.errors import DataError
from ofakern.plan import build_plan
from ofakern.text import Tokenizer

TOKENIZER = Tokenizer.train(["a red ball and the blue cat near yes no maybe so"] * 3, 300, bins=64)
CONFIG = PreprocessConfig(image_size=32)
IMAGE = Image.new("RGB", (80, 60), "red")
ROW: dict[str, Any] = {
    "img": IMAGE,
    "cap": "a red ball",
    "more": "the cat",
    "ans": "Maybe so",
    "box": "10,6,70,50",
    "boxes": ["0,0,40,30", "10,10,70,50", "5,5,20,20"],
    "names": ["red ball", "cat", "the blue cat"],
    "known": ["no", "yes", "no"],
}
ANSWERS = {"ans": ["yes", "maybe", "Maybe so"]}


def answer(instruction: str) -> tuple[Any, Any]:
    plan = build_plan(instruction)
    sets = build_closed_sets(plan, ANSWERS, TOKENIZER)
    example = Encoder(plan, TOKENIZER, CONFIG, split="test", closed_sets=sets)(ROW)
    tokens = [*example.target[0].value[1:].tolist(), int(example.labels[-1])]
    reader = AnswerReader(plan, TOKENIZER, CONFIG, sets)
    return reader(tokens, example.columns, prefix_length=example.prefix_length, score=-1.5), example


@pytest.mark.parametrize(
    ("instruction", "values"),
    [
        ("[IMAGE:img] -> [TEXT:cap]", {"cap": "a red ball"}),
        ("[IMAGE:img] -> it shows [TEXT:cap]", {"cap": "a red ball"}),
        ("[IMAGE:img] -> [TEXT:more,no_loss] then [TEXT:cap]", {"cap": "a red ball"}),
        ("[IMAGE:img] -> [TEXT:cap] beside [TEXT:more] .", {"cap": "a red ball", "more": "the cat"}),
        ("[IMAGE:img] -> [TEXT:ans,closed_set]", {"ans": "Maybe so"}),
        ("[IMAGE:img] -> [TEXT:ans,closed_set,uncased] [BOX:box]", {"ans": "Maybe so", "box": ROW["box"]}),
        ("[IMAGE:img] -> [BOX:box]", {"box": ROW["box"]}),
        (
            "[IMAGE:img] -> [TEXT:cap] [BOX:box] near [TEXT:more]",
            {"cap": "a red ball", "box": ROW["box"], "more": "the cat"},
        ),
        ("[IMAGE:img] -> found: ([BOX:boxes] [TEXT:names])*", {"boxes": ROW["boxes"], "names": ROW["names"]}),
        (
            "[IMAGE:img] -> ([TEXT:names] at [BOX:boxes])* and [TEXT:cap]",
            {"boxes": ROW["boxes"], "names": ROW["names"], "cap": "a red ball"},
        ),
        ("[IMAGE:img] -> ([TEXT:known,no_loss] : [TEXT:names] ;)*", {"names": ROW["names"]}),
    ],
)
def test_what_goes_in_comes_out(instruction: str, values: dict[str, Any]) -> None:
    output, _ = answer(instruction)
    assert set(output.values) == set(values)
    for name, value in values.items():
        got = output.values[name]
        if name in ("box", "boxes"):
            pairs = zip(got, value, strict=True) if name == "boxes" else [(got, value)]
            for box, text in pairs:
                assert box == pytest.approx([float(x) for x in text.split(",")], abs=80 / 63)
        else:
            assert got == value
    assert output.score == -1.5 and output.image.size == (80, 60)


def test_shortcuts() -> None:
    output, _ = answer("[IMAGE:img] -> [TEXT:cap] beside [TEXT:more]")
    assert output.text == "a red ball the cat" and output.box is None
    output, _ = answer("[IMAGE:img] -> ([BOX:boxes] [TEXT:names])*")
    assert len(output.boxes) == 3 and output.box == output.boxes[0]
    output, _ = answer("[IMAGE:img] -> [BOX:box]")
    assert output.text is None


def test_tokens_that_are_no_box() -> None:
    plan = build_plan("[IMAGE:img] -> [BOX:box]")
    reader = AnswerReader(plan, TOKENIZER, CONFIG)
    output = reader(TOKENIZER.encode("a red ball near"), {"<image sizes>": {"img": (8, 8)}})
    assert output.box is None and output.boxes == [] and output.values == {"box": None}
    assert reader([2], {"<image sizes>": {"img": (8, 8)}}).box is None
    with pytest.raises(DataError, match="size of image 'img'"):
        reader([2])


def test_answer_outside_the_closed_set_is_text() -> None:
    plan = build_plan("[IMAGE:img] -> [TEXT:ans,closed_set]")
    reader = AnswerReader(plan, TOKENIZER, CONFIG, build_closed_sets(plan, ANSWERS, TOKENIZER))
    assert reader([*TOKENIZER.encode("a blue cat"), 2, 1, 1]).text == "a blue cat"

"""Rows to Examples: groups, noise, truncation, columns, and every way a row can be wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ofakern.data.batch import PackedBatch
from ofakern.data.example import IMAGE_SIZES, IMAGES, ROW_NUMBER, Encoder, PreprocessConfig, build_closed_sets
from ofakern.errors import DataError, OfakernRuntimeError, OfakernValueError
from ofakern.plan import build_plan, build_plans
from ofakern.text import Tokenizer

TOKENIZER = Tokenizer.train(["a red ball and the blue cat near yes no maybe so"] * 3, 300, bins=64)
V = TOKENIZER.vocabulary
CONFIG = PreprocessConfig(image_size=32)
IMAGE = Image.new("RGB", (80, 60), "red")


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def encoder(instruction: str, split: Any = "train", **options: Any) -> Encoder:
    return Encoder(build_plan(instruction), TOKENIZER, options.pop("config", CONFIG), split=split, **options)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_several_target_slots_have_their_own_ids() -> None:
    row = {"img": IMAGE, "a": "red", "b": "8,6,40,30"}
    example = encoder("[IMAGE:img] -> it is [TEXT:a] at [BOX:b]")(row)
    parts = [("it is", 0, False), ("red", 1, True), ("at", 2, False)]
    slots = [slot for text, slot, _ in parts for _ in ids(text)] + [3] * 5
    loss = [has for text, _, has in parts for _ in ids(text)] + [True] * 5
    assert example.target_slot is not None and example.target_slot.tolist() == slots
    assert (example.labels != -100).tolist() == loss
    assert example.labels[-1] == V.eos
    assert example.prefix_length == len(ids("it is"))
    assert torch.equal(example.target[0].value[1:][loss[:-1]], example.labels[:-1][loss[:-1]])


def test_repeated_groups_unroll_columns_on_both_sides() -> None:
    row = {"img": IMAGE, "b": ["0,0,40,30", "8,6,40,30"], "t": ["red ball", "cat"], "q": ["yes", "no"], "p": ["a", "b"]}
    example = encoder("[IMAGE:img] ([TEXT:q] : [TEXT:p])* -> ([BOX:b] [TEXT:t])*")(row)
    words = [token for text in ("yes", ":", "a", "no", ":", "b") for token in ids(text)]
    assert example.source[1].value.tolist() == [V.bos, *words, V.eos]
    start = V.range("bin").start
    boxes = [[start + k for k in bins] for bins in ([0, 0, 32, 32], [6, 6, 32, 32])]
    assert example.labels.tolist() == [*boxes[0], *ids("red ball"), *boxes[1], *ids("cat"), V.eos]
    assert example.prefix_length == 0


def test_sounds_repeat_and_are_hidden_in_training_only() -> None:
    row = {"a": [torch.randn(1600), torch.randn(3200)], "t": ["red", "cat"], "y": "yes"}
    text = "([AUDIO:a,freq_mask=20,time_mask=4] [TEXT:t])* -> [TEXT:y]"
    example = encoder(text, "valid")(row)
    assert [segment.adaptor for segment in example.source] == ["audio_fbank", "text"] * 2
    assert [segment.length for segment in example.source[::2]] == [1, 3]  # 8 and 18 frames
    again, trained = encoder(text, "valid")(row, 0, rng(1)), encoder(text)(row, 0, rng(1))
    assert torch.equal(again.source[2].value, example.source[2].value)
    assert not torch.equal(trained.source[2].value, example.source[2].value)
    batch = PackedBatch.collate([example])
    assert [tuple(values.value.shape) for values in batch.source.segments if values.adaptor != "text"] == [(2, 18, 80)]


def test_a_group_that_mixes_kinds_repeats_its_segments() -> None:
    row = {"img": [IMAGE, Image.new("RGB", (20, 20), "blue")], "t": ["red", "blue"], "a": "yes"}
    example = encoder("see: ([IMAGE:img] is [TEXT:t])* ? -> [TEXT:a]", "test")(row)
    assert [s.modality for s in example.source] == [1, 2, 1, 2, 1, 1]
    assert [s.plan_segment for s in example.source] == [0, 1, 2, 1, 2, 3]
    assert example.source[4].value.tolist() == [V.bos, *ids("is"), *ids("blue"), V.eos]
    assert float(example.source[3].value[2].mean()) == 1.0
    assert example.columns[IMAGE_SIZES] == {"img": (80, 60)}


def test_noise_and_masks_are_for_training_only_and_leave_labels_clean() -> None:
    text = "a red ball and the blue cat near the red ball"
    instruction = "[TEXT:s,mask_ratio=0.5] -> [TEXT:t,noise_ratio=0.5,mask_ratio=0.3]"
    row = {"s": text, "t": text}
    clean = encoder(instruction, "valid")(row, 0, rng())
    noisy = encoder(instruction)(row, 0, rng())
    again = encoder(instruction)(row, 0, rng())
    assert clean.source[0].value.tolist() == [V.bos, *ids(text), V.eos]
    assert V.mask in noisy.source[0].value.tolist()
    assert noisy.source[0].value[0] == V.bos and noisy.source[0].value[-1] == V.eos
    assert torch.equal(noisy.labels, clean.labels)
    assert noisy.target[0].value.shape == clean.target[0].value.shape
    assert not torch.equal(noisy.target[0].value, clean.target[0].value)
    assert torch.equal(noisy.target[0].value, again.target[0].value)


def test_truncation_keeps_begin_and_end() -> None:
    config = PreprocessConfig(max_source_length=6, max_target_length=5)
    text = "a red ball and the blue cat near yes no"
    example = encoder("[TEXT:s] -> [TEXT:t]", config=config)({"s": text, "t": text})
    assert example.source[0].value.tolist() == [V.bos, *ids(text)[:4], V.eos]
    assert example.target[0].value.tolist() == [V.bos, *ids(text)[:4]]
    assert example.labels.tolist() == [*ids(text)[:4], V.eos]


def test_alternatives_are_drawn_in_training_only() -> None:
    plans = build_plans("[TEXT:s] one -> [TEXT:t] ||| [TEXT:s] two -> [TEXT:t]")
    row = {"s": "a", "t": "b"}
    train, valid = (Encoder(plans, TOKENIZER, split=split) for split in ("train", "valid"))
    lasts = {tuple(train(row, 0, rng(seed)).source[0].value.tolist()) for seed in range(20)}
    assert len(lasts) == 2
    assert {tuple(valid(row, 0, rng(seed)).source[0].value.tolist()) for seed in range(20)} == {
        (V.bos, *ids("a"), *ids("one"), V.eos)
    }


def test_columns_are_kept_for_evaluation_only() -> None:
    row = {"img": IMAGE, "t": "a", "refs": ["a", "b"]}
    kept = [encoder("[IMAGE:img] -> [TEXT:t]", split)(row, 7).columns for split in ("train", "valid", "test")]
    assert kept[0] == {}
    assert kept[1] == {**row, ROW_NUMBER: 7, IMAGE_SIZES: {"img": (80, 60)}}
    assert kept[2][IMAGES]["img"].size == (80, 60)
    batch = PackedBatch.collate([encoder("[IMAGE:img] -> [TEXT:t]", "test")(row, 7)])
    assert batch.columns["refs"] == [["a", "b"]]


def test_boxes_are_relative_to_the_named_image() -> None:
    row = {"x": IMAGE, "y": Image.new("RGB", (40, 60)), "b": "0,0,40,60", "a": "yes"}
    start = V.range("bin").start
    for image, right in (("x", 32), ("y", 63)):
        example = encoder(f"[IMAGE:x] [IMAGE:y] region [BOX:b,image={image}] -> [TEXT:a]")(row)
        assert example.source[2].value[-5:-1].tolist() == [start, start, start + right, start + 63]


def test_ready_tensors_and_other_adaptors() -> None:
    ready = torch.randn(3, 32, 32)
    config = PreprocessConfig(image_size=32, image_tokens={"image_vit": 9})
    example = encoder("[IMAGE:img,adaptor=image_vit] -> [TEXT:t]", config=config)({"img": ready, "t": "a"})
    assert torch.equal(example.source[0].value, ready)
    assert example.source[0].length == 9


def test_a_text_group_without_begin_and_end() -> None:
    example = encoder("[TEXT:s,disable_auto_boseos] -> [TEXT:t]")({"s": "a red ball", "t": "a"})
    assert example.source[0].value.tolist() == ids("a red ball")


def test_no_loss_target_text_is_needed_for_inference() -> None:
    run = encoder("[TEXT:s] -> [TEXT:q,no_loss] [TEXT:t]", "test")
    example = run({"s": "a", "q": "red"})
    assert example.target[0].value.tolist() == [V.bos, *ids("red")]
    with pytest.raises(DataError, match="column 'q' must be there"):
        run({"s": "a"})


@pytest.mark.parametrize(
    ("instruction", "row", "message"),
    [
        ("[IMAGE:img] -> [TEXT:t]", {"img": IMAGE, "x": 1}, r"row 5: column 't' must be .* columns \['img', 'x'\]"),
        ("[IMAGE:img] -> [TEXT:t]", {"img": None, "t": "a"}, "row 5: column 'img' .* it is empty"),
        ("[IMAGE:img] -> [TEXT:t]", {"img": "gone.png", "t": "a"}, "row 5, column 'img': image must be an existing"),
        ("[IMAGE:img] -> [TEXT:t]", {"img": IMAGE, "t": ["a"]}, "row 5, column 't': text must be a string, got list"),
        ("[IMAGE:img] -> [BOX:b]", {"img": IMAGE, "b": "0,0,90,3"}, "row 5, column 'b': box must lie inside the image"),
        ("[TEXT:s] -> [TEXT:a,closed_set]", {"s": "a", "a": "perhaps"}, "one of the closed set .* got 'perhaps'"),
        ("[TEXT:s] -> ([TEXT:a] : [TEXT:b])*", {"s": "a", "a": ["x"], "b": ["x", "y"]}, "must have equal lengths"),
        ("[TEXT:s] -> ([TEXT:a])*", {"s": "a", "a": "x"}, "value of a repeated group must be a list, got str"),
        ("[TEXT:s] -> ([TEXT:a])*", {"s": "a", "a": []}, "must not be empty"),
        ("([IMAGE:img])* -> [TEXT:a]", {"img": [IMAGE, b"x"], "a": "x"}, r"column 'img'\[1\]: image must be readable"),
        ("[TEXT:s] -> [TEXT:t]", {"s": "a \ud800", "t": "a"}, "row 5, column 's': text must be valid Unicode"),
    ],
)
def test_bad_rows(instruction: str, row: dict[str, Any], message: str) -> None:
    sets = build_closed_sets(build_plan(instruction), {"a": ["yes", "no"]}, TOKENIZER)
    with pytest.raises(DataError, match=message):
        encoder(instruction, closed_sets=sets)(row, 5)


def test_bad_plans() -> None:
    with pytest.raises(OfakernRuntimeError, match="CATEGORY"):
        encoder("[IMAGE:i] -> [CATEGORY:c]")
    for target in ("[IMAGE:i]", "([MOTION:m])*"):
        with pytest.raises(OfakernValueError, match="vocabulary must hold image codes|must be one run"):
            encoder(f"[TEXT:t] -> {target}")
    with pytest.raises(OfakernValueError, match="vocabulary must hold phones"):
        encoder("[PHONE:p] -> [TEXT:t]")
    with pytest.raises(OfakernValueError, match="n_frames_per_step of .* must be the model's"):
        encoder("[AUDIO:a,n_frames_per_step=2] -> [TEXT:t]")
    with pytest.raises(OfakernValueError, match="col_type of .* must be like c:k:c, got 'rows'"):
        encoder("[STRUCT:db,col_type=rows] -> [TEXT:t]")
    with pytest.raises(OfakernValueError, match="one run of text-like slots or one AUDIO, MOTION"):
        encoder("[TEXT:t] -> say [AUDIO:a]")
    with pytest.raises(OfakernValueError, match="one run of text-like slots or one AUDIO, MOTION"):
        Encoder(build_plans("[TEXT:t] -> [AUDIO:a] ||| [TEXT:t] -> [TEXT:b]"), TOKENIZER)
    with pytest.raises(OfakernValueError, match="closed_sets must hold one"):
        encoder("[TEXT:s] -> [TEXT:t,closed_set]")
    with pytest.raises(OfakernValueError, match="answers must be given for slot"):
        build_closed_sets(build_plan("[TEXT:s] -> [TEXT:t,closed_set]"), {}, TOKENIZER)
    no_bins = Tokenizer.train(["a"], 256, bins=0)
    with pytest.raises(DataError, match="bins must be at least 2"):
        Encoder(build_plan("[IMAGE:img] -> [BOX:b]"), no_bins)

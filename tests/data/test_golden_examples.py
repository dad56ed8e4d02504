"""From raw rows to slot values, targets, prefixes and closed-set masks: equal to the golden arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ofakern.data.batch import PackedBatch
from ofakern.data.example import Encoder, PreprocessConfig, build_closed_sets
from ofakern.data.readers import open_files
from ofakern.plan import build_plan
from ofakern.text import Tokenizer, Vocabulary

GOLDEN = Path(__file__).parents[1] / "golden"
MAIN = GOLDEN / "ofasys/main"
CASES: dict[str, Any] = json.loads((GOLDEN / "data/preprocess_cases.json").read_text())
RAW = json.loads((MAIN / "cases_raw.json").read_text())
CONFIG = PreprocessConfig(image_size=64, box_image_size=64)
ANSWERS = {"tgt": ["yes", "no", "maybe so"]}
PAD = 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    resources = MAIN / "resources"
    return Tokenizer.from_files(
        resources / "bpe_encoder.json", resources / "bpe_vocab.bpe", resources / "bpe_dict.txt", codes=64, bins=32
    )


def whole_tokenizer() -> Tokenizer:
    """The recorded vocabulary, phones included."""
    resources = MAIN / "resources"
    vocabulary = Vocabulary(json.loads((MAIN / "dictionary.json").read_text())["symbols"])
    names = ("bpe_encoder.json", "bpe_vocab.bpe", "bpe_dict.txt")
    return Tokenizer.from_files(*(resources / name for name in names), vocabulary=vocabulary)


def unpadded(ids: list[int]) -> list[int]:
    return [i for i in ids if i != PAD]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("case", list(CASES))
def test_golden_case(case: str, split: Any, tokenizer: Tokenizer) -> None:
    plan = build_plan(RAW[case]["instruction"])
    sets = build_closed_sets(plan, ANSWERS, tokenizer)
    encoder = Encoder(plan, tokenizer, CONFIG, split=split, closed_sets=sets, files=open_files(MAIN))
    images = np.load(GOLDEN / "data/images.npz")["img"]
    golden = CASES[case]
    examples = [encoder(row, i) for i, row in enumerate(RAW[case]["data"])]
    for b, (row, example) in enumerate(zip(RAW[case]["data"], examples, strict=True)):
        segments = [*example.source, *example.target]
        assert len(segments) == len(golden["slots"])
        for segment, slot in zip(segments, golden["slots"], strict=True):
            if slot["modality"] == "IMAGE":
                assert np.array_equal(segment.value.numpy(), images[int(row["img"] == "raw/img2.png")])
            else:
                assert segment.value.tolist() == unpadded(slot["value"][b])
        length = len(example.labels)
        expected = golden["target"][b]
        assert [PAD if label == -100 else label for label in example.labels.tolist()] == expected[:length]
        assert all(i == PAD for i in expected[length:])
        forced = example.target[0].value[1 : 1 + example.prefix_length].tolist()
        assert forced == golden["prefix"][b]
        if "allowed" in golden:
            assert example.allowed is not None
            assert [a.tolist() for a in example.allowed] == golden["allowed"][b][:length]
        else:
            assert example.allowed is None
    batch = PackedBatch.collate(examples)
    assert batch.labels.shape[0] == batch.target.tokens


def test_golden_speech() -> None:
    """Phones and frames of the tts case. OFASys gives phones a begin and an end of their own inside the text group."""
    encoder = Encoder(build_plan(RAW["tts"]["instruction"]), whole_tokenizer(), CONFIG, files=open_files(MAIN))
    golden = np.load(MAIN / "tts.npz")
    for b, row in enumerate(RAW["tts"]["data"]):
        example = encoder(row, b)
        recorded = unpadded(golden["input.slot0.TEXT.value"][b].tolist())
        assert example.source[0].value.tolist() == without_inner_marks(recorded)
        length = int(golden["input.slot1.AUDIO.fbank_lengths"][b])
        assert example.frames is not None and len(example.frames) == length
        assert np.abs(example.frames.numpy() - golden["target"][b, :length]).max() < 1e-4
        assert np.abs(example.target[0].value.numpy() - golden["input.slot1.AUDIO.fbank"][b, :length]).max() < 1e-4
        assert example.labels.tolist() == [0] * (length - 1) + [1]


def without_inner_marks(ids: list[int]) -> list[int]:
    """OFASys gives phones a begin and an end of their own inside a text group."""
    return [ids[0], *(token for token in ids[1:-1] if token not in (0, 2)), ids[-1]]


@pytest.mark.parametrize("case", ["struct_table", "multi_image_interleaved", "asr"])
def test_golden_sources(case: str) -> None:
    """Tables, several images and phones, sound: every source slot from the raw row."""
    encoder = Encoder(build_plan(RAW[case]["instruction"]), whole_tokenizer(), CONFIG, files=open_files(MAIN))
    golden = np.load(MAIN / f"{case}.npz")
    for b, row in enumerate(RAW[case]["data"]):
        example = encoder(row, b)
        keys = [key for key in golden if key.startswith("input.slot") and not key.endswith("_lengths")]
        assert len(keys) == len(example.source) + len(example.target)
        for key, segment in zip(sorted(keys), [*example.source, *example.target], strict=True):
            recorded = golden[key][b]
            if recorded.ndim == 1:
                assert segment.value.tolist() == without_inner_marks(unpadded(recorded.tolist()))
            else:
                assert np.abs(recorded[: len(segment.value)] - segment.value.numpy()).max() < 1e-3


@pytest.mark.parametrize("case", list(CASES))
def test_without_a_target_only_the_forced_prefix_is_given(case: str, tokenizer: Tokenizer) -> None:
    plan = build_plan(RAW[case]["instruction"])
    sets = build_closed_sets(plan, ANSWERS, tokenizer)
    encoder = Encoder(plan, tokenizer, CONFIG, split="test", closed_sets=sets, files=open_files(MAIN))
    for b, row in enumerate(RAW[case]["data"]):
        example = encoder({k: v for k, v in row.items() if k != "tgt"}, b)
        assert example.target[0].value.tolist() == [0, *CASES[case]["prefix"][b]]
        assert example.prefix_length == len(CASES[case]["prefix"][b])
        assert example.labels.tolist() == [-100] * (1 + example.prefix_length)


@pytest.mark.parametrize("number", range(6))
def test_golden_slot_attributes(number: int, tokenizer: Tokenizer) -> None:
    case = json.loads((GOLDEN / "data/text_cases.json").read_text())["text_attr"][number]
    example = Encoder(build_plan(case["instruction"]), tokenizer, split=case["split"])(case["data"])
    values = [segment.value.tolist() for segment in (*example.source, *example.target)]
    assert values == [slot["value"][0] for slot in case["slots"]]
    labels = torch.where(example.labels == -100, PAD, example.labels)
    assert labels.tolist() == case["target"][0]
    assert int((example.labels != -100).sum()) == case["ntokens"]
    if case["split"] == "test":
        assert example.target[0].value[1 : 1 + example.prefix_length].tolist() == case["prefix"][0]

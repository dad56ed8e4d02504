"""Large closed sets are saved with their tokens, which are used only while they fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scenes import scenes, small_model

from ofakern.checkpoint import GeneralistModel
from ofakern.checkpoint.encoded_sets import ENCODED_SETS, LEAST
from ofakern.checkpoint.known_task import KnownTask
from ofakern.errors import CheckpointError, DataError
from ofakern.tasks import Task
from ofakern.text import ClosedSet, Tokenizer
from ofakern.text.trie import TokenSequences

ANSWERS = tuple(f"card {number}" for number in range(LEAST))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small_model()
    big = Task("big", "[TEXT:q] -> [TEXT:card,closed_set]", closed_set=ANSWERS)
    small = Task("small", "[TEXT:q] -> [TEXT:answer,closed_set]", closed_set=("yes", "no"))
    model.prepare([task.add_dataset(scenes(), "train") for task in (big, small)])
    folder = tmp_path_factory.mktemp("large") / "model"
    model.save_pretrained(folder)
    return folder


def encoded_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[KnownTask, list[str]]:
    """The big task of a model loaded from `folder`, its set made; and the texts that were encoded for it."""
    texts: list[str] = []
    known = GeneralistModel.from_pretrained(folder)
    encode = Tokenizer.encode

    def noted(self: Tokenizer, text: str, **kwargs: Any) -> list[int]:
        texts.append(text)
        return encode(self, text, **kwargs)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    task = known.tasks["big"]
    closed = task.closed_sets(known.tokenizer)["card"]
    assert closed.answers == ANSWERS and closed.answer(encode(known.tokenizer, "card 77")) == "card 77"
    assert task.closed_sets(known.tokenizer)["card"] is closed
    return task, texts


def test_tokens_are_read_instead_of_made(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(saved / ENCODED_SETS)
    assert set(tensors) == {"big/card/tokens", "big/card/offsets"}
    task, texts = encoded_of(saved, monkeypatch)
    assert not texts
    fresh = ClosedSet(ANSWERS, GeneralistModel.from_pretrained(saved).tokenizer)
    assert torch.equal(torch.from_numpy(fresh.sequences.tokens), tensors["big/card/tokens"])
    assert torch.equal(torch.from_numpy(fresh.sequences.offsets), tensors["big/card/offsets"])
    others = task.with_answers(["one", "two"])
    assert not others.encoded


@pytest.mark.parametrize("change", ["answers", "plan"])
def test_tokens_of_something_else_are_left_out(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    plans = json.loads((folder / "plans.json").read_text())
    if change == "answers":
        plans["tasks"]["big"]["closed_sets"]["card"][:2] = ["card 1", "card 0"]
    else:
        slot = plans["tasks"]["big"]["plans"][0]["target"][0]["slots"][0]
        slot["attributes"] = {**slot["attributes"], "uncased": True}
    (folder / "plans.json").write_text(json.dumps(plans))
    model = GeneralistModel.from_pretrained(folder)
    assert not model.tasks["big"].encoded
    closed = model.tasks["big"].closed_sets(model.tokenizer)["card"]
    for answer in ("card 0", "card 1", f"card {LEAST - 1}"):
        assert closed.answer(model.tokenizer.encode(answer)) == answer


def test_a_damaged_file_is_an_error(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    whole = (folder / ENCODED_SETS).read_bytes()
    (folder / ENCODED_SETS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="must hold closed sets"):
        GeneralistModel.from_pretrained(folder)
    tensors = load_file(saved / ENCODED_SETS)
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    tensors["big/card/offsets"][-1] += 1
    save_file(tensors, folder / ENCODED_SETS, header["__metadata__"])
    with pytest.raises(CheckpointError, match="whole token sequences"):
        GeneralistModel.from_pretrained(folder)


def test_tokens_must_be_of_the_answers() -> None:
    with pytest.raises(DataError, match="one for each of 2 answers"):
        ClosedSet.encoded(["a", "b"], TokenSequences.of([(1,)]))

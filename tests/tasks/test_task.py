"""Tasks: names, data sets, closed sets, references, texts for a vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ofakern.errors import DataError, InstructionError, OfakernTypeError, OfakernValueError
from ofakern.tasks import Task

CAPTION = "[IMAGE:img] what does the image describe? -> [TEXT:cap]"
QUESTION = "[IMAGE:img] [TEXT:q] -> [TEXT:answer,closed_set]"
ROWS = [{"img": None, "q": f"question {i}?", "answer": "yes" if i % 3 else "no"} for i in range(6)]


def test_data_sets_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = Task("vqa", QUESTION, micro_batch_size=2)
    assert task.add_dataset(path).add_dataset(iter(ROWS), "valid").add_dataset(tuple(ROWS), "test") is task
    for split in ("train", "valid", "test"):
        rows = task.rows(split)
        assert rows is not None and len(rows) == 6 and rows[4]["q"] == "question 4?"
    task.add_dataset(ROWS[:2], "train")
    joined = task.rows("train")
    assert joined is not None and len(joined) == 8 and joined[7] == ROWS[1]
    with pytest.raises(IndexError):
        joined[8]
    assert "train=8" in repr(task)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["b", "a", "b"], ("b", "a")),
        ({"b": 0, "a": 1}, ("b", "a")),
        (None, ("no", "yes")),
        ("q", tuple(f"question {i}?" for i in range(6))),
    ],
)
def test_closed_sets(given: Any, expected: tuple[str, ...]) -> None:
    task = Task("vqa", QUESTION, closed_set=given).add_dataset(ROWS)
    assert task.closed_answers() == {"answer": expected}
    assert Task("caption", CAPTION, closed_set=["x"]).closed_answers() == {}


def test_a_closed_set_needs_answers() -> None:
    with pytest.raises(DataError, match="no training rows"):
        Task("vqa", QUESTION).closed_answers()
    with pytest.raises(DataError, match="column 'label'"):
        Task("vqa", QUESTION, closed_set="label").add_dataset(ROWS).closed_answers()


def test_alternatives_and_references() -> None:
    task = Task("t", ["[TEXT:a] -> [TEXT:b]", "again: [TEXT:a] -> [TEXT:b]"])
    assert task.instruction == "[TEXT:a] -> [TEXT:b] ||| again: [TEXT:a] -> [TEXT:b]"
    assert len(task.alternatives) == 2 and task.target_field == "b"
    assert Task("t", "[TEXT:a] -> [BOX:b] [TEXT:c]").target_field == "c"
    assert Task("t", "[TEXT:a] -> [TEXT:c]", target_field="refs").target_field == "refs"
    with pytest.raises(OfakernValueError, match="target_field"):
        _ = Task("t", "[TEXT:a] -> [TEXT]").target_field


def test_texts_of_a_vocabulary() -> None:
    rows = [{"a": "one", "b": ["two", "three"], "img": "x.png"}, {"a": None, "b": "four"}]
    task = Task("t", "[IMAGE:img] say [TEXT:a] -> so: [TEXT:b]").add_dataset(rows)
    assert list(task.texts()) == ["say", "so:", "one", "two", "three", "four"]
    assert list(Task("t", "say [TEXT:a] -> [TEXT:b]", texts=["mine"]).add_dataset(rows).texts()) == ["say", "mine"]


def test_preprocess() -> None:
    task = Task("t", "[TEXT:a] -> [TEXT:b]", preprocess=lambda row: None if row["a"] is None else {**row, "b": "x"})
    assert task.prepared({"a": "1"}) == {"a": "1", "b": "x"}
    with pytest.raises(DataError, match="kept by preprocess"):
        task.prepared({"a": None})


def test_wrong_arguments() -> None:
    with pytest.raises(InstructionError):
        Task("t", "[IMAGE:img] what?")
    for kwargs, name in (
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"update_freq": True}, "update_freq"),
        ({"weight": -1}, "weight"),
        ({"metrics": ["bleu5"]}, "metrics"),
    ):
        with pytest.raises(OfakernValueError, match=name):
            Task("t", CAPTION, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(OfakernTypeError, match="callable"):
        Task("t", CAPTION, metrics={"mine": 3})  # type: ignore[dict-item]
    with pytest.raises(OfakernValueError, match="name"):
        Task("two words", CAPTION)
    with pytest.raises(OfakernValueError, match="split"):
        Task("t", CAPTION).add_dataset(ROWS, "dev")
    with pytest.raises(DataError, match="existing file"):
        Task("t", CAPTION).add_dataset("/nowhere.jsonl")

"""The demonstration's data: its size, its licences, its rows and its composed scenes."""

from __future__ import annotations

import demo_data
import numpy as np
import pytest

SETS = {"noto_emoji", "easy_vqa", "playing_cards"}


def test_data_is_small_and_licensed() -> None:
    files = [path for path in demo_data.DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    for name in SETS:
        names = {path.name for path in (demo_data.DATA / name).iterdir()}
        assert "DATA.md" in names
        assert any(n.startswith("LICENSE") for n in names)


def test_splits_share_no_photo() -> None:
    train, test = ({np.asarray(p.picture).tobytes() for p in demo_data.card_photos(s)} for s in ("train", "test"))
    assert (len(train), len(test)) == (296, 67)
    assert not train & test


@pytest.mark.parametrize(
    ("rows", "count", "columns"),
    [
        (demo_data.caption_rows("test"), 168, {"img", "cap"}),
        (demo_data.caption_rows("train", passes=2), 2 * 1482, {"img", "cap"}),
        (demo_data.question_rows("test"), 3898, {"img", "question", "answer"}),
        (demo_data.question_rows("train", length=500), 500, {"img", "question", "answer"}),
        (demo_data.grounding_rows("test"), 91, {"img", "card", "box"}),
    ],
)
def test_counts_and_columns(rows: demo_data.Rows, count: int, columns: set[str]) -> None:
    assert len(rows) == count
    assert set(rows[0]) == columns
    assert rows[0]["img"].mode == "RGB"


def test_answers_are_closed() -> None:
    assert len(demo_data.answers()) == 13
    assert {answer for _, _, answer in demo_data.questions("test")} <= set(demo_data.answers())


def test_training_questions_are_balanced() -> None:
    given = [row["answer"] for row in demo_data.question_rows("train", size=8, length=300)]
    counts = [sum(answer in kind for answer in given) for kind in demo_data._answer_kinds()]
    assert sum(counts) == 300 and min(counts) > 75


def test_training_rows_depend_on_their_index_only() -> None:
    first = demo_data.grounding_rows("train", size=64, length=50)
    again = demo_data.grounding_rows("train", size=64, length=50)
    for i in (7, 3, 7):
        one, two = first[i], again[i]
        assert one["box"] == two["box"] and one["card"] == two["card"]
        assert np.array_equal(np.asarray(one["img"]), np.asarray(two["img"]))


def test_scenes_hold_their_boxes() -> None:
    for row in demo_data.grounding_rows("train", size=64, length=60):
        x0, y0, x1, y1 = row["box"]
        assert row["img"].size == (64, 64)
        assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
        assert row["card"] in demo_data.CARD_CLASSES


def test_repeated_captions_are_varied() -> None:
    rows = demo_data.caption_rows("train", passes=2)
    one, two = rows[0], rows[1482]
    assert one["cap"] == two["cap"]
    assert not np.array_equal(np.asarray(one["img"]), np.asarray(two["img"]))

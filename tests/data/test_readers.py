"""Rows from files and collections; files from folders and archives; across forks and pickles."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ofakern.data.readers import Rows, open_files, open_rows
from ofakern.errors import DataError

ROWS = [{"a": "1", "b": 'x, "y"\nz'}, {"a": "2", "b": "caf\u00e9 \u2028 end"}, {"a": "3", "b": ""}]


def every(rows: Rows) -> list[dict[str, Any]]:
    return [dict(rows[i]) for i in range(len(rows))]


def test_jsonl_with_blank_lines_and_mark(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert every(open_rows(path)) == ROWS
    assert every(open_rows(str(path), columns={"a": "n"})) == [{"n": row["a"]} for row in ROWS]


def test_json_list(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    assert every(open_rows(tmp_path / "d.json")) == ROWS


def test_csv_with_quoted_line_ends(tmp_path: Path) -> None:
    import csv

    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["a", "b"])
        writer.writeheader()
        writer.writerows(ROWS)
    assert every(open_rows(tmp_path / "d.csv")) == ROWS
    big = "x" * 300_000
    (tmp_path / "big.csv").write_text(f"img\n{big}\n")
    assert open_rows(tmp_path / "big.csv")[0] == {"img": big}


def test_tsv_of_ofa(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text('u1\tq"1\tAAA=\t7\r\nu2\tq 2\t\t8\r\n')
    expected = [{"uid": "u1", "img": "AAA=", "q": 'q"1'}, {"uid": "u2", "img": "", "q": "q 2"}]
    assert every(open_rows(tmp_path / "d.tsv", columns="0:uid,2:img,1:q")) == expected
    assert every(open_rows(tmp_path / "d.tsv", columns={0: "uid", 2: "img", 1: "q"})) == expected
    names = open_rows(tmp_path / "d.tsv", columns=["uid", "q", "img"])
    assert [dict(names[i]) for i in range(2)] == [{k: r[k] for k in ("uid", "q", "img")} for r in expected]
    (tmp_path / "h.tsv").write_text("uid\timg\nu1\tA\n")
    assert every(open_rows(tmp_path / "h.tsv")) == [{"uid": "u1", "img": "A"}]
    assert every(open_rows(tmp_path / "h.tsv", columns="img:picture")) == [{"picture": "A"}]
    assert every(open_rows(tmp_path / "h.tsv", columns="1:picture", header=True)) == [{"picture": "A"}]


class HuggingFaceLike:
    """What we use of `datasets.Dataset`."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"a": index, "b": "x"}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        raise AssertionError("must not be read whole")


def test_collections() -> None:
    assert open_rows(ROWS)[1] == ROWS[1]
    assert every(open_rows(row for row in ROWS)) == ROWS
    assert every(open_rows(HuggingFaceLike(), columns={"a": "n"})) == [{"n": 0}, {"n": 1}]


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("d.jsonl", '{"a": 1}\n{"a": \n{"a": 3}\n', None, "record 1 must be JSON"),
        ("d.jsonl", '{"a": 1}\n[1]\n', None, "record 1 must be a JSON object, got list"),
        ("d.csv", "a,b\n1,2\n1,2,3\n", None, "row 1 must have 2 columns, got 3"),
        ("d.tsv", "1\t2\n1\n", "0:x,1:y", "row 1 must have column 1, got 1 columns"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', None, "record 1 must be UTF-8"),
        ("d.jsonl", '{"a": 1}\n{"b": 1}\n', {"a": "x"}, "row 1: columns must hold 'a', got .'b'."),
    ],
)
def test_broken_records_raise_when_asked_for(
    tmp_path: Path, name: str, content: str | bytes, columns: Any, message: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = open_rows(tmp_path / name, columns=columns)
    assert rows[0]
    with pytest.raises(DataError, match=message):
        rows[1]


def test_wrong_sources(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_text("")
    (tmp_path / "d.tsv").write_text("a\tb\n")
    (tmp_path / "d.json").write_text("{}")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "none.jsonl", {}, "must be an existing file"),
        (tmp_path / "d.parquet", {}, "must end in"),
        (tmp_path / "d.tsv", {"columns": "x:y"}, "must be among"),
        (tmp_path / "d.tsv", {"columns": "9:y", "header": True}, "must be below 2"),
        (tmp_path / "d.tsv", {"header": False}, "without a header"),
        (tmp_path / "d.tsv", {"columns": "0:y,1:y"}, "a name of its own"),
        (tmp_path / "d.json", {}, "must be a JSON list"),
        ({"a": [1, 2]}, {}, "got one mapping"),
        (3, {}, "got int"),
        (ROWS, {"columns": "0:y"}, "must be names"),
    ]
    for source, options, message in cases:
        with pytest.raises(DataError, match=message):
            open_rows(source, **options)
    with pytest.raises(DataError, match="row 0: row must be a mapping"):
        open_rows(["text"])[0]  # type: ignore[list-item]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as file:
        for i in range(50):
            file.writestr(f"top/in/{i}.bin", str(i) * 100)
    return path


def test_archives_and_folders(archive: Path, tmp_path: Path) -> None:
    files = open_files(archive)
    assert files is not None
    assert files.read("top/in/7.bin") == files.read("in/7.bin") == b"7" * 100
    assert "7.bin" not in files and "top/" not in files
    with pytest.raises(DataError, match="images.zip: file must exist, got '7.bin'"):
        files.read("7.bin")
    (tmp_path / "f").mkdir()
    (tmp_path / "f/x").write_bytes(b"1")
    folder = open_files(str(tmp_path / "f"))
    assert folder is not None and folder.read("x") == b"1"
    with pytest.raises(DataError, match="file must exist, got '../images.zip'"):
        folder.read("../images.zip")
    assert open_files(None) is None
    with pytest.raises(DataError, match="must be a folder or a .zip"):
        open_files(tmp_path / "f/x")


def test_damaged_member(archive: Path) -> None:
    data = bytearray(archive.read_bytes())
    data[60] ^= 0xFF
    archive.write_bytes(data)
    files = open_files(archive)
    assert files is not None
    with pytest.raises(DataError, match="must be readable"):
        files.read("in/0.bin")


def _read_all(rows: Rows, files: Any, results: Any) -> None:
    good = all(rows[i]["i"] == i and files.read(f"in/{i}.bin") == str(i).encode() * 100 for i in range(50))
    results.put(good)


def test_forked_workers_do_not_disturb_each_other(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"i": i}) + "\n" for i in range(50)))
    rows, files = open_rows(path), open_files(archive)
    assert rows[3]["i"] == 3
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_read_all, args=(rows, files, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert all(results.get(timeout=30) for _ in workers)
    for worker in workers:
        worker.join()
    again_rows, again_files = pickle.loads(pickle.dumps((rows, files)))
    assert again_rows[9] == {"i": 9} and again_files.read("in/9.bin") == b"9" * 100

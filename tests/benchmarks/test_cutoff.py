"""A run of `ofakern bench` that is cut off: what it had measured is in the file and can be used."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import memory, report, run, tables, timing
from ofakern.cli import main as cli

ARGUMENTS = ["bench", "attention", "--quick", "--case", "small_16", "--dtype", "f32", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.MemoryMeter, "available", False)


def cut_at(monkeypatch: pytest.MonkeyPatch, phase: int, cut: Any) -> None:
    """`cut` is called in the place of timing the `phase`-th phase."""
    right, calls = timing.in_turn, iter(range(100))
    monkeypatch.setattr(timing, "in_turn", lambda *args: cut() if next(calls) == phase else right(*args))


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("cut", [interrupt, terminate])
def test_what_was_measured_is_kept(
    cut: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, before = tmp_path / "deep/r.json", signal.getsignal(signal.SIGTERM)
    cut_at(monkeypatch, 1, cut)
    assert cli.main([*ARGUMENTS, "--json", str(path)]) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]
    printed = capsys.readouterr().out
    assert "small_16" in printed and "the run was cut off" in printed
    found = tables.load(path)
    assert found["complete"] is False
    assert {record["phase"] for record in found["records"]} == {"fwd"}
    assert found["records"][0]["versus"].keys() == {"sdpa_plain", "sdpa_mask", "sdpa_concat", "ofasys"}
    assert "(`r.json`)" in report.page([path]) and "The run was cut off" in report.page([path])
    assert "note: the old run was cut off" in tables.compare(found | {"complete": True}, found)


@pytest.mark.usefixtures("no_memory")
def test_the_file_grows_and_is_marked_until_the_end(tmp_path: Path) -> None:
    kept: list[dict[str, Any]] = []
    options = run.Options(["attention"], ["f32"], ["small_16"], quick=True, threads=1)
    results = run.run(options, kept.append)
    counts = [len(found["records"]) for found in kept]
    assert counts == sorted(counts) and counts[0] < counts[-1] == len(results["records"])
    assert not any(found["complete"] for found in kept) and results["complete"]
    assert "cut off" not in tables.render(results) + tables.compare(results, results)


@pytest.mark.skipif(not memory.MemoryMeter.available, reason="needs /proc/self/clear_refs")
def test_times_are_kept_when_memory_is_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    monkeypatch.setattr(run, "_peak", lambda *args: interrupt())
    assert cli.main([*ARGUMENTS, "--json", str(path)]) == 130
    assert {(record["phase"], record["peak_mib"]) for record in tables.load(path)["records"]} == {("fwd", None)}


@pytest.mark.usefixtures("no_memory")
def test_nothing_takes_no_files_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("an older run's", encoding="utf-8")
    cut_at(monkeypatch, 0, interrupt)
    assert cli.main([*ARGUMENTS, "--json", str(path)]) == 130
    assert path.read_text(encoding="utf-8") == "an older run's"


@pytest.mark.skipif(not memory.MemoryMeter.available, reason="needs /proc/self/clear_refs")
def test_a_cut_ends_the_memory_helper() -> None:
    with pytest.raises(KeyboardInterrupt), memory.MemoryMeter("attention") as meter:
        process = meter._process
        interrupt()
    assert process.returncode == -signal.SIGKILL

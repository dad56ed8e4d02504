"""The README's snippets run as they stand, and its commands are ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, commands, python_blocks

from ofakern.cli import main as cli

BLOCKS = python_blocks("README.md")
UPDATES = "max_updates=500"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where the repository's data is found and what a snippet writes does no harm."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(source, "README.md", "exec"), names)
    return names


def test_there_is_a_snippet_for_each_way_of_use() -> None:
    assert [next(word for word in ("Task(", "scaled_dot", "attention(") if word in block) for block in BLOCKS] == [
        "attention(",
        "scaled_dot",
        "Task(",
    ]


def test_packed_attention_gives_every_gradient() -> None:
    names = run(BLOCKS[0])
    assert names["out"].shape == names["q"].shape
    for name in ("q", "k", "v", "table"):
        assert bool(names[name].grad.abs().sum() > 0), name


def test_padded_attention_is_torchs_with_concatenated_positions() -> None:
    names = run(BLOCKS[1])
    query, key = (torch.cat([names[a], names[b]], dim=-1) for a, b in (("q", "q_pos"), ("k", "k_pos")))
    scale = names["q"].shape[-1] ** -0.5
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, names["v"], is_causal=True, scale=scale)
    torch.testing.assert_close(names["out"], expected, rtol=1e-4, atol=1e-5)


def test_a_task_from_one_line(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it but the number of updates, which is for a reader with some minutes."""
    assert UPDATES in BLOCKS[2]
    names = run(BLOCKS[2].replace(UPDATES, "max_updates=1"))
    assert (clone / "emoji-model" / "model.safetensors").is_file()
    assert names["model"].tasks.keys() == {"caption"}
    capsys.readouterr()


@pytest.mark.parametrize("arguments", [c for c in commands("README.md") if c[0] in ("info", "plan")], ids=" ".join)
def test_cheap_commands_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.strip()

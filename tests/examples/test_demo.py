"""The demonstration runs from the data to its pictures."""

from __future__ import annotations

import json
from pathlib import Path

import demo
import pytest
from PIL import Image

from ofakern import GeneralistModel


def test_demo_writes_results_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--updates", "2", "--minutes", "2", "--limit", "6", "--seed", "3", "--output", str(tmp_path)]
    assert demo.main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    for task in ("caption", "vqa", "grounding"):
        assert {"metric", "value", "baseline", "n"} <= set(results[task])
        assert 0 <= results[task]["value"] <= 1 and results[task]["n"] == 6
    assert {"acc", "acc_baseline"} <= set(results["grounding"])
    assert results["updates"] == 2 and results["seconds"] > 0
    for name in ("sheet.png", "loss.png"):
        assert min(Image.open(tmp_path / name).size) > 300
    assert str(tmp_path / "sheet.png") in capsys.readouterr().out
    reloaded = GeneralistModel.from_pretrained(tmp_path / "model")
    assert set(reloaded.tasks) == {"caption", "vqa", "grounding"}


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--help"])
    assert stopped.value.code == 0
    assert "example: python examples/demo.py" in capsys.readouterr().out

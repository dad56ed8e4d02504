"""The snippets of docs/PATCH.md run as they stand."""

from __future__ import annotations

import pytest
import torch
from pages import python_blocks

from ofakern.nn.dropin import DropIn
from ofakern.patching import PatchReport

pytest.importorskip("transformers")
BLOCKS = python_blocks("docs/PATCH.md")


def run(source: str) -> dict[str, object]:
    names: dict[str, object] = {}
    exec(compile(source, "docs/PATCH.md", "exec"), names)
    return names


def test_the_patch_trains_and_is_undone(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(BLOCKS[0])
    assert "T5Attention -> ofakern T5Attention" in capsys.readouterr().out
    model, report = names["model"], names["report"]
    assert isinstance(model, torch.nn.Module) and isinstance(report, PatchReport)
    assert sorted(row.before for row in report.replaced) == ["T5Attention"] * 2 + ["T5LayerNorm"] * 5
    assert not any(isinstance(module, DropIn) for module in model.modules())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert names["state"].keys() == model.state_dict().keys()


def test_the_registered_attention_is_used() -> None:
    names = run(BLOCKS[1])
    assert names["model"].config._attn_implementation == "ofakern"
    assert names["logits"].shape == (1, 12, 100)

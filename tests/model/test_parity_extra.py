"""`ofakern parity` on OFASys's parts beside its model: the image tokenizer, the diffusion loss and a DDIM sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ofakern.checkpoint import golden_extra
from ofakern.cli.main import main
from ofakern.modality.motion.diffusion import NoiseSchedule

EXTRA = Path(__file__).parents[1] / "golden" / "ofasys" / "extra"


def test_the_recorded_parts_agree(tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    assert main(["parity", str(EXTRA), "--backend", "reference", "--json", str(path)]) == 0
    report: dict[str, Any] = json.loads(path.read_text())
    found = {name: {check["name"] for check in case["checks"]} for name, case in report["cases"].items()}
    assert found == {
        "vqgan": {"quant_in", "logits", "noiseless_argmax", "decoded"},
        "diffusion_loss": {"alphas_cumprod", "loss"},
        "ddim_sample": {"timesteps", "output"},
    }


def test_wrong_weights_of_the_loss_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoiseSchedule, "weights", lambda self, t: torch.ones(t.shape))
    assert main(["parity", str(EXTRA), "--backend", "reference", "--case", "diffusion_loss"]) == 1


def test_rotations_left_as_predicted_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden_extra, "orthonormal_features", lambda features: features)
    assert main(["parity", str(EXTRA), "--backend", "reference", "--case", "ddim_sample"]) == 1

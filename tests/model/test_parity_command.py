"""`ofakern parity` on the recorded cases, and what it must notice."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ofakern.checkpoint.golden import load_model
from ofakern.checkpoint.golden_case import Case
from ofakern.checkpoint.parity import run_case
from ofakern.cli.main import main
from ofakern.errors import CheckpointError
from ofakern.model import OFAPlus
from ofakern.nn import relative
from ofakern.nn.attention import MultiheadAttention
from ofakern.ops import backends

GOLDEN = Path(__file__).parents[1] / "golden" / "ofasys" / "main"
CASES = [
    "text2text",
    "text_b1",
    "caption",
    "closed_set",
    "prefix_decoder_prompt",
    "grounding_box_out",
    "region_caption_box_in",
    "image_gen",
    "asr",
    "tts",
    "video_caption",
    "motion_diffusion",
    "struct_table",
    "multi_image_interleaved",
]


@pytest.fixture(scope="module", params=["reference", "cpu"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command wrote for all cases with a backend; its exit code under "code"."""
    refusal = backends("attention")[request.param]
    if refusal is not None:
        pytest.skip(f"attention's {request.param} backend: {refusal}")
    path = tmp_path_factory.mktemp("parity") / "parity.json"
    code = main(["parity", str(GOLDEN), "--backend", request.param, "--json", str(path)])
    return {**json.loads(path.read_text()), "code": code}


def test_the_command_passes(report: dict[str, Any]) -> None:
    assert report["code"] == 0 and report["passed"] and list(report["cases"]) == CASES


@pytest.mark.parametrize("case", CASES)
def test_recorded_case(case: str, report: dict[str, Any]) -> None:
    checks = report["cases"][case]["checks"]
    assert [c["name"] for c in checks if not c["passed"]] == []
    groups = {"adaptors", "encoder", "decoder", "loss", "gradients", "any order"}
    groups |= {"frames"} if case == "motion_diffusion" else {"logits", "incremental"}
    assert {c["group"] for c in checks} >= groups


@pytest.fixture(scope="module")
def golden_model() -> OFAPlus:
    return load_model(GOLDEN, "reference")[0]


def _attentions(model: OFAPlus) -> list[MultiheadAttention]:
    return [module for module in model.modules() if isinstance(module, MultiheadAttention)]


def _without_head_scale(model: OFAPlus) -> None:
    for attention in _attentions(model):
        attention.use_head_scale = False


def _wrong_scale(model: OFAPlus) -> None:
    for attention in _attentions(model):
        attention.scale = attention.width**-0.5


def _without_tables(model: OFAPlus) -> None:
    for name, parameter in model.named_parameters():
        if "rel_pos_table" in name:
            nn.init.zeros_(parameter)


def _without_cross_positions(model: OFAPlus) -> None:
    assert model.decoder.cross_pos_q_linear is not None
    nn.init.zeros_(model.decoder.cross_pos_q_linear.weight)


def _one_wrong_bias(model: OFAPlus) -> None:
    with torch.no_grad():
        model.get_parameter("decoder.layers.1.fc1.bias")[3] += 0.05


@pytest.mark.parametrize(
    "break_it", [_without_head_scale, _wrong_scale, _without_tables, _without_cross_positions, _one_wrong_bias]
)
def test_a_broken_model_is_noticed(break_it: Callable[[OFAPlus], None], golden_model: OFAPlus) -> None:
    model = copy.deepcopy(golden_model)
    break_it(model)
    result = run_case(model, Case(GOLDEN, "text_b1", model))
    groups = {check.group for check in result.checks if not check.passed}
    assert not result.passed and "logits" in groups


def test_a_video_needs_its_frames_table(golden_model: OFAPlus) -> None:
    model = copy.deepcopy(golden_model)
    for name, parameter in model.named_parameters():
        if "video_rel_pos_table" in name:
            nn.init.zeros_(parameter)
    result = run_case(model, Case(GOLDEN, "video_caption", model))
    assert {"encoder", "logits"} <= {check.group for check in result.checks if not check.passed}


def test_a_motion_needs_its_noise_level(golden_model: OFAPlus) -> None:
    case = Case(GOLDEN, "motion_diffusion", golden_model)
    case.target = replace(case.target, levels=(3, 16))
    assert "frames" in {check.group for check in run_case(golden_model, case).checks if not check.passed}


def test_a_bucket_off_by_one_is_noticed(monkeypatch: pytest.MonkeyPatch, golden_model: OFAPlus) -> None:
    right = relative.text_bucket
    monkeypatch.setattr(relative, "text_bucket", lambda *args: (right(*args) + 1).clamp(max=30))
    result = run_case(golden_model, Case(GOLDEN, "text_b1", golden_model))
    assert not result.passed and "adaptors" in {c.group for c in result.checks if not c.passed}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy with one case, to be damaged."""
    for name in ("config.json", "state_dict.safetensors", "state_dict_manifest.json", "text_b1.json", "text_b1.npz"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    (tmp_path / "index.json").write_text(json.dumps({"text_b1": {"ok": True}}))
    return tmp_path


def test_a_changed_recording_fails_the_command(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load(directory / "text_b1.npz") as arrays:
        changed = {name: arrays[name].copy() for name in arrays.files}
    changed["decoder.output"][0, 0, 0] += 0.01
    np.savez(directory / "text_b1.npz", **changed)
    page = directory / "page.md"
    assert main(["parity", str(directory), "--backend", "reference", "--markdown", str(page)]) == 1
    assert "DIFFERS" in capsys.readouterr().out and "**differs**" in page.read_text()


def test_an_unknown_adaptor_is_not_available_yet(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load(directory / "text_b1.npz") as arrays:
        renamed = {name.replace("adaptor_call0.text", "adaptor_call0.audio_vocoder"): arrays[name] for name in arrays}
    np.savez(directory / "text_b1.npz", **renamed)
    command = ["parity", str(directory), "--backend", "reference"]
    assert main(command) == 0
    assert "not available yet: AUDIO (audio_vocoder)" in capsys.readouterr().out
    assert main([*command, "--case", "text_b1"]) == 1


def test_missing_and_unknown_keys_are_named(directory: Path) -> None:
    manifest = json.loads((directory / "state_dict_manifest.json").read_text())
    key = "encoder.adaptor.image_resnet.embed_images.conv1.weight"
    entry = manifest.pop(key)
    (directory / "state_dict_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="1 missing.*conv1"):
        load_model(directory)
    manifest[key] = entry
    manifest["encoder.surprise"] = {**entry, "shape": [2]}
    (directory / "state_dict_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="1 unknown.*surprise"):
        load_model(directory)


def test_bad_arguments_are_user_errors(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", str(directory), "--case", "nothing"]) == 2
    assert "--case must be one of" in capsys.readouterr().err
    assert main(["parity", str(directory / "absent")]) == 2
    (directory / "config.json").write_text("[")
    assert main(["parity", str(directory)]) == 2

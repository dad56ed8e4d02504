"""The recorded flag variants of OFASys: every number, the quirks under compat, and what is right without it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ofakern.checkpoint.golden import read_json
from ofakern.checkpoint.golden_variants import Variant, run_variant
from ofakern.cli.main import main
from ofakern.data.batch import PackedBatch
from ofakern.errors import OfakernValueError
from ofakern.modality.audio.adaptor import tokens_in_ofasys, tokens_of
from ofakern.model import OFAPlus, SegmentWriter
from ofakern.nn.experts import Routing

VARIANTS = Path(__file__).parents[1] / "golden" / "ofasys" / "variants"
NAMES = [name for name, entry in read_json(VARIANTS / "index.json").items() if entry["ok"]]


def logits_of(model: OFAPlus, batch: PackedBatch) -> list[Tensor]:
    with torch.no_grad():
        return list(torch.split(model.logits(model(batch)), list(batch.target.lengths_cpu)))


@pytest.mark.parametrize("name", NAMES)
def test_recorded_variant(name: str) -> None:
    result = run_variant(VARIANTS, name)
    assert [(c.group, c.name) for c in result.checks if not c.passed] == []
    groups = {c.group for c in result.checks}
    assert groups >= {"batch of 1", "batch of 2", "gradient norms", "batch of 2, beam5", "batch of 2, greedy"}


@pytest.mark.parametrize("name", ["v07_modal_ffn", "v20_share_bias_scale_resids_modal"])
def test_experts_get_their_own_modality_unless_compat_asks_for_the_published_mistake(name: str) -> None:
    variant = Variant(VARIANTS, name)
    right, published = variant.model(""), variant.model("ofasys")
    alone, both = logits_of(right, variant.batch(1)), logits_of(right, variant.batch(2))
    torch.testing.assert_close(alone[0], both[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone[0], logits_of(published, variant.batch(1))[0], rtol=1e-4, atol=1e-4)
    recorded = torch.from_numpy(variant.arrays["B2.logits"][0, : len(both[0])])
    assert (both[0] - recorded).abs().max() > 1.0
    torch.testing.assert_close(logits_of(published, variant.batch(2))[0], recorded, rtol=1e-4, atol=1e-4)


def test_without_compat_the_scale_and_head_weights_stay_without_relative_bias() -> None:
    variant = Variant(VARIANTS, "v05_nobias_entangle_model_and_adaptors")
    recorded = variant.arrays["B1.logits"][0]
    right = logits_of(variant.model(""), variant.batch(1))[0].numpy()
    assert np.abs(right - recorded).max() / np.abs(recorded).max() > 1e-2


def test_audio_keeps_the_tokens_its_frames_give() -> None:
    assert [tokens_of(n) for n in (0, 6, 7, 15, 24, 31, 80)] == [0, 0, 1, 3, 5, 7, 19]
    assert tokens_in_ofasys(15, 24) == 4 and tokens_in_ofasys(31, 43) == 8 and tokens_in_ofasys(24, 24) == 5
    variant = Variant(VARIANTS, "v00_default")
    assert variant.batch(2).source.segments[0].lengths.tolist() == [5, 4]
    model, batch = variant.model(""), variant.batch(2, compat="")
    assert batch.source.lengths_cpu == (13, 3 + 5)
    alone = PackedBatch.collate([variant._example(1, "")])
    torch.testing.assert_close(logits_of(model, batch)[1], logits_of(model, alone)[0], rtol=1e-4, atol=1e-4)


def test_experts_train_and_need_a_routing() -> None:
    model = Variant(VARIANTS, "v07_modal_ffn").model("")
    batch = Variant(VARIANTS, "v07_modal_ffn").batch(2, compat="")
    model(batch).square().mean().backward()
    experts = model.encoder.get_submodule("layers.0.experts_fc1")
    used = [i for i in range(9) if experts.get_parameter(f"{i}.weight").grad is not None]
    assert used == [0, 3]  # TEXT and AUDIO
    with pytest.raises(OfakernValueError, match="routing"):
        layer = model.encoder.get_submodule("layers.0")
        layer.feed_forward(torch.zeros(1, 64), None, None)  # type: ignore[operator]
    routing = Routing.build(torch.tensor([2, 0, 2, 1]))
    x = torch.arange(4.0)[:, None]
    experts = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    assert routing.runs == ((0, 1), (1, 1), (2, 2))
    expected = torch.cat([experts[e](experts[e](x[i : i + 1])) for i, e in enumerate((2, 0, 2, 1))])
    torch.testing.assert_close(routing.leave(routing.enter(x, experts), experts), expected)


def test_a_written_segment_has_the_expert_of_its_modality() -> None:
    variant = Variant(VARIANTS, "v07_modal_ffn")
    model, example = variant.model(""), variant._example(0, "")
    tokens = example.target[0].value
    boxes = replace(example, target=[replace(example.target[0], modality=3)])
    batch = PackedBatch.collate([boxes])
    expected = logits_of(model, batch)[0]
    assert not torch.allclose(expected, logits_of(model, PackedBatch.collate([example]))[0], atol=1e-2)
    writer = SegmentWriter(model, "text", 3)
    with torch.no_grad():
        state = writer.begin_decode(model.encode(batch.source), 1, len(tokens))
        steps = torch.cat([writer.decode_step(state, tokens[t : t + 1]) for t in range(len(tokens))])
    torch.testing.assert_close(steps, expected, rtol=1e-4, atol=1e-4)


def test_the_command_reads_the_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["v01_share_attn_bias", "v06_nobias_noentangle", "v17_patch_embed_with_bias"]
    report = tmp_path / "report.json"
    arguments = [part for name in names for part in ("--case", name)]
    assert main(["parity", str(VARIANTS), *arguments[:2], "--json", str(report)]) == 0
    assert json.loads(report.read_text())["cases"][names[0]]["passed"]
    main(["parity", str(VARIANTS), *arguments[2:]])
    out = capsys.readouterr().out
    assert "entangle_position_embedding must be on" in out and "simply have no relative bias" in out

"""The recorded variant v16: patch embeddings, entangled positions, no relative bias, and the scale quirk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formula_weights import weights
from torch import Tensor

from ofakern.checkpoint.golden import config_from_ofasys
from ofakern.data.batch import Example, PackedBatch, Segment
from ofakern.model import OFAPlus
from ofakern.nn.loss import label_smoothed_cross_entropy

VARIANTS = Path(__file__).parents[1] / "golden" / "ofasys" / "variants"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((VARIANTS / "v16_patch_embed_nobias_entangle.json").read_text())
    for file in ("inputs.npz", "v16_patch_embed_nobias_entangle.npz"):
        with np.load(VARIANTS / file) as arrays:
            meta.update({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    return meta


def build(recorded: dict[str, Any], compat: str) -> OFAPlus:
    options = {**recorded["config_model"], "adaptor": recorded["config_adaptors"]}
    config, missing = config_from_ofasys(options, vocab_size=434)
    assert not missing
    model = OFAPlus(replace(config, compat=compat), backend="reference").eval()
    outcome = model.load_state_dict(weights(recorded["keys"]), strict=False)
    assert not outcome.unexpected_keys and outcome.missing_keys == ["decoder.adaptor.embed_tokens.weight"]
    return model


def batch_of(recorded: dict[str, Any], samples: int) -> PackedBatch:
    def kept(values: Tensor) -> Tensor:
        return values[values != 1].long()

    examples = []
    for b in range(samples):
        target = kept(recorded["prev_output_tokens"][b])
        labels = recorded["target"][b][: len(target)].long()
        source = [
            Segment(0, "image_patch_embed", 2, recorded["image32"][b], length=17),
            Segment(1, "text", 1, kept(recorded["src_tokens"][b])),
        ]
        examples.append(Example(source, [Segment(2, "text", 1, target)], labels.masked_fill(labels == 1, -100)))
    return PackedBatch.collate(examples)


@pytest.mark.parametrize("samples", [1, 2])
def test_logits_and_loss(recorded: dict[str, Any], samples: int) -> None:
    model, batch = build(recorded, "ofasys"), batch_of(recorded, samples)
    with torch.no_grad():
        hidden = model(batch)
        loss = label_smoothed_cross_entropy(hidden, model.output_weight, batch.labels).loss
    logits = recorded[f"B{samples}.logits"]
    expected = torch.cat([logits[b, :n] for b, n in enumerate(batch.target.lengths_cpu)])
    error = (model.logits(hidden) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    assert float(loss) == pytest.approx(recorded[f"B{samples}.loss_sum"], rel=1e-6)


def test_the_quirk_is_off_by_default(recorded: dict[str, Any]) -> None:
    batch = batch_of(recorded, 1)
    with torch.no_grad():
        logits = build(recorded, "").logits(build(recorded, "")(batch))
    expected = recorded["B1.logits"][0, : len(logits)]
    assert (logits - expected).abs().max() / expected.abs().max() > 1e-2

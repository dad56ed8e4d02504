"""Parts of models in a recorded training step, by the CPU's kernels and in plain torch, a GPU's road today."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from replay import stand_in
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ofakern.data.batch import Example, PackedBatch, Segment
from ofakern.modality.image.adaptor import ImageResnetConfig, ImageVitConfig
from ofakern.modality.image.vit import SHAPES, VitShape
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import OFAConfig, OFAPlus
from ofakern.nn import norm
from ofakern.nn.loss import label_smoothed_cross_entropy
from ofakern.ops import library
from ofakern.ops.graph import StepGraph, recorder_for
from ofakern.ops.selection import Backends
from ofakern.train.inputs import owned

CPU = torch.device("cpu")
TEXT = TextAdaptorConfig(max_position=32, bucket_size=6)
RESNET = ImageResnetConfig(resnet_blocks=(1, 1, 1), resnet_width=8, drop_path=0.1)
VIT = ImageVitConfig(vit_type="vit_small", drop_path=0.1)
PARTS: dict[str, dict[str, Any]] = {
    "prefixes": {"encoder_prefix": 3, "decoder_prefix": 2},
    "experts": {"modal_ffn": True, "entangle_position_embedding": True},
    "order": {"max_segments": 4, "target_slots": 2, "scale_resids": True},
    "resnet": {"adaptors": (TEXT, RESNET)},
    "vit": {"adaptors": (TEXT, VIT)},
}


def batch_for(adaptor: str | None) -> PackedBatch:
    text = [Segment(1, "text", 1, torch.arange(4, 9))]
    target = Segment(1, "text", 1, torch.arange(4, 7))
    images = [Segment(0, adaptor, 2, torch.randn(3, 32, 32), length=4)] if adaptor else []
    return PackedBatch.collate([Example([*images, *text], [target], torch.tensor([5, 6, 7]))] * 2)


@pytest.fixture(autouse=True)
def small_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "vit_small", VitShape(size=32, patch=16, width=16, blocks=1, heads=2))


def model_and_batch(part: str) -> tuple[OFAPlus, PackedBatch]:
    rates: dict[str, float] = {"dropout": 0.1, "attention_dropout": 0.1, "encoder_drop_path": 0.1}
    flags: dict[str, Any] = {"adaptors": (TEXT,), **PARTS[part]}
    sizes: dict[str, int] = {"vocab_size": 40, "dim": 16, "ffn_dim": 24, "heads": 2}
    model = OFAPlus(OFAConfig(**sizes, **rates, encoder_layers=1, decoder_layers=1, **flags), seed=0).train()
    image = f"image_{part}" if len(flags["adaptors"]) > 1 else None
    return model, model.prepare(batch_for(image), share_positions=False)


def step(model: OFAPlus, batch: PackedBatch) -> list[Tensor]:
    loss = label_smoothed_cross_entropy(model(batch), model.output_weight, batch.labels, 0.1).loss
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [loss.detach(), *(gradient for gradient in found if gradient is not None)]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_a_replay_has_the_eager_bits(part: str, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr(library, "_CPU", ())
        monkeypatch.setattr(Backends, "select", lambda *_: "reference")
        monkeypatch.setattr(norm, "has_kernel", lambda *_: False)
    model, batch = model_and_batch(part)
    static = owned(batch, CPU)
    with stand_in():
        recorded = StepGraph(lambda: step(model, static), recorder_for(CPU), warmups=1)
    for seed in range(2):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        torch.manual_seed(seed)
        expected = step(model, batch)
        moved = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state)
        torch.manual_seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(recorded.replay(), expected, strict=True))
        assert all(torch.equal(value, moved[name]) for name, value in model.state_dict().items())


class OnHost(TorchDispatchMode):
    """Ops that give tensors of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.device.type == "cpu" for x in tree_leaves(out)):
            self.found.append(func.name())
        return out


@pytest.mark.parametrize("part", PARTS)
def test_no_tensor_of_a_step_is_on_the_host(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another device than the CPU, one without values."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # unknown there
    model, batch = model_and_batch(part)
    static, model = owned(batch, torch.device("meta")), model.to("meta")
    with OnHost() as host:
        found = step(model, static)
    assert host.found == [] and {tensor.device.type for tensor in found} == {"meta"}
    with OnHost() as host:
        _ = torch.arange(3).to("meta") + torch.tensor([1]).to("meta")
    assert host.found == ["aten::arange", "aten::lift_fresh"]

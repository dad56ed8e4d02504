"""The ResNet adaptor with fewer and narrower blocks than the published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.modality.adaptors import adaptor_config, adaptor_options
from ofakern.modality.image.adaptor import ImageResnetConfig
from ofakern.modality.image.resnet import ResNet
from ofakern.nn import recompute


def test_features_have_sixteen_times_the_width() -> None:
    backbone = ResNet("resnet50", frozen_norm=True, blocks=(1, 2, 1), width=8)
    assert backbone(torch.zeros(2, 3, 64, 48)).shape == (2, 128, 4, 3)
    assert sum(1 for _ in backbone.blocks()) == 4


def test_published_backbones_are_unchanged() -> None:
    backbone = ResNet("resnet50")
    assert backbone.channels == 1024
    assert [len(stage) for stage in (backbone.layer1, backbone.layer2, backbone.layer3)] == [3, 4, 6]


def test_config_survives_plain_data() -> None:
    config = ImageResnetConfig(resnet_blocks=(1, 2, 2), resnet_width=16)
    options = adaptor_options(config)
    options["resnet_blocks"] = list(options["resnet_blocks"])
    assert adaptor_config("image_resnet", options) == config


@pytest.mark.parametrize("blocks", [(1, 2), (0, 1, 1)])
def test_wrong_blocks_are_named(blocks: tuple[int, int, int]) -> None:
    with pytest.raises(OfakernValueError, match="blocks must be three counts"):
        ResNet("resnet50", blocks=blocks)


def test_wrong_width_is_named() -> None:
    with pytest.raises(OfakernValueError, match="width must be at least 1, got 0"):
        ResNet("resnet50", width=0)


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that the backward pass reads is kept."""
    monkeypatch.setattr(recompute, "_FEW", float("inf"))


@pytest.fixture(autouse=True)
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_FEW", 0)


def outcome(backbone: ResNet, images: Tensor, times: int = 1) -> list[Tensor]:
    """Output, gradients of images and parameters, then every buffer."""
    images = images.detach().requires_grad_()
    out = backbone(images)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    for number in range(times):
        grads = torch.autograd.grad(out, [images, *backbone.parameters()], dout, retain_graph=number + 1 < times)
    return [out.detach(), *grads, *(buffer.clone() for buffer in backbone.buffers())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"frozen_norm": True}, {"drop_path": 0.5}], ids=["", "frozen", "drop_path"])
def test_what_is_computed_again_has_the_same_bits(
    dtype: torch.dtype, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> list[Tensor]:
        torch.manual_seed(0)
        backbone = ResNet("resnet50", blocks=(1, 2, 1), width=4, **settings).to(dtype).train()
        return outcome(backbone, torch.randn(2, 3, 48, 32).to(dtype))

    ours = made()
    plain(monkeypatch)
    for have, want in zip(ours, made(), strict=True):
        assert torch.equal(have, want)


def test_statistics_count_a_batch_once_however_often_it_is_differentiated() -> None:
    images = torch.randn(2, 3, 64, 48)
    found = []
    for times in (1, 2):
        torch.manual_seed(0)
        backbone = ResNet("resnet50", blocks=(1, 1, 1), width=8).train()
        found.append(outcome(backbone, images, times))
        assert backbone.bn1.num_batches_tracked is not None and int(backbone.bn1.num_batches_tracked) == 1
    assert all(map(torch.equal, *found))


def kept_bytes(backbone: ResNet, images: Tensor) -> int:
    """Of the tensors that the backward pass will read, parameters apart."""
    storages = {p.untyped_storage().data_ptr(): 0 for p in backbone.parameters()}

    def keep(x: Tensor) -> Tensor:
        storages.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = backbone(images)
    assert out.requires_grad
    return sum(storages.values())


def test_half_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, images = ResNet("resnet50", width=16).train(), torch.randn(1, 3, 96, 96)
    ours = kept_bytes(backbone, images)
    plain(monkeypatch)
    assert ours < 0.52 * kept_bytes(backbone, images)

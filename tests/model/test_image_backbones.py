"""Batch norm folding, the vision transformer, and grids of any shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ofakern.errors import OfakernValueError
from ofakern.modality.image.resnet import ResNet
from ofakern.modality.image.vit import SHAPES, VisionTransformer, VitShape


@pytest.fixture
def resnet() -> ResNet:
    torch.manual_seed(0)
    model = ResNet("resnet50").eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.0)
                module.bias.normal_(std=0.1)
                module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return model


def test_folding_changes_nothing_and_follows_the_weights(resnet: ResNet) -> None:
    images = torch.randn(2, 3, 48, 33)
    expected = resnet(images)  # gradients on: not folded
    assert expected.shape == (2, 1024, 3, 3) and resnet._folded is None
    with torch.no_grad():
        torch.testing.assert_close(resnet(images), expected, rtol=1e-4, atol=1e-4)
        kept = resnet._folded
        resnet(images)
        assert kept is not None and resnet._folded is kept
        resnet.conv1.weight.mul_(1.5)
    changed = resnet(images)
    assert not torch.allclose(changed, expected, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(resnet(images), changed, rtol=1e-4, atol=1e-4)
        resnet.load_state_dict({k: v * 0.9 if v.is_floating_point() else v for k, v in resnet.state_dict().items()})
    loaded = resnet(images)
    with torch.no_grad():
        torch.testing.assert_close(resnet(images), loaded, rtol=1e-4, atol=1e-4)


def test_training_moves_statistics_unless_frozen() -> None:
    images = torch.randn(2, 3, 32, 32)
    for frozen in (False, True):
        model = ResNet("resnet50", drop_path=0.5, frozen_norm=frozen).train()
        model(images)
        assert bool(model.bn1.running_mean.any()) is not frozen  # type: ignore[union-attr]
    with pytest.raises(OfakernValueError, match="kind"):
        ResNet("resnet18")


def test_the_transformer_keeps_images_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "vit_small", VitShape(size=32, patch=8, width=32, blocks=2, heads=2))
    model = VisionTransformer("vit_small", backend="reference").eval()
    native, other = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        for images, tokens in ((native, 16), (other, 6)):
            out = model(images)
            assert out.shape == (2 * tokens, 32)
            torch.testing.assert_close(model(images[1:]), out[tokens:], rtol=1e-5, atol=1e-5)
    with pytest.raises(OfakernValueError, match="multiples of 8"):
        model(torch.zeros(1, 3, 20, 32))

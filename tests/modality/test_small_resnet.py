"""The ResNet adaptor with fewer and narrower blocks than the published ones."""

from __future__ import annotations

import pytest
import torch

from ofakern.errors import OfakernValueError
from ofakern.modality.adaptors import adaptor_config, adaptor_options
from ofakern.modality.image.adaptor import ImageResnetConfig
from ofakern.modality.image.resnet import ResNet


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

"""The image_patch_embed adaptor: one product per patch, equal to its Conv2d; pixels as floats or as bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.modality.image.adaptor import ImagePatchEmbedAdaptor, ImagePatchEmbedConfig
from ofakern.nn.adaptor import SideShape

SIDE = SideShape(dim=24, heads=2, tables=1, source=True, dropout=0.0, entangle_position_embedding=False)


def make_adaptor(class_token: bool) -> ImagePatchEmbedAdaptor:
    torch.manual_seed(0)
    config = ImagePatchEmbedConfig(
        image_height=8, image_width=12, patch_height=4, patch_width=4, class_token=class_token
    )
    return ImagePatchEmbedAdaptor(config, SIDE)


def embed(adaptor: ImagePatchEmbedAdaptor, images: Tensor) -> Tensor:
    values: Any = SimpleNamespace(value=images, positions=torch.zeros(adaptor.tokens * images.shape[0]))
    return adaptor.embed(values, nn.Embedding(1, SIDE.dim))


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("images", [0, 3])
def test_equals_the_convolution(class_token: bool, images: int) -> None:
    adaptor = make_adaptor(class_token)
    pixels = torch.randn(images, 3, 8, 12)
    want = adaptor.proj(pixels).flatten(2).transpose(1, 2)
    got = embed(adaptor, pixels).view(images, adaptor.tokens, SIDE.dim)
    torch.testing.assert_close(got[:, int(class_token) :], want)
    parameters = list(adaptor.proj.parameters())
    weights = torch.randn(want.shape)
    gradients = torch.autograd.grad((got[:, int(class_token) :] * weights).sum(), parameters)
    for have, exact in zip(gradients, torch.autograd.grad((want * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(have, exact, rtol=1e-4, atol=1e-4)


def test_bytes_are_normalised_as_the_transform_does() -> None:
    adaptor = make_adaptor(True)
    pixels = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    torch.testing.assert_close(embed(adaptor, pixels), embed(adaptor, (pixels / 255 - 0.5) / 0.5))


def test_pixels_can_have_a_gradient() -> None:
    adaptor = make_adaptor(False)
    pixels = torch.randn(1, 3, 8, 12, requires_grad=True)
    out = embed(adaptor, pixels)
    torch.testing.assert_close(out, embed(adaptor, pixels.detach()))
    assert torch.autograd.grad(out.square().sum(), pixels)[0].abs().sum() > 0


def test_bytes_elsewhere_than_on_the_cpu_are_refused() -> None:
    adaptor = make_adaptor(False).to("meta")
    with pytest.raises(OfakernValueError, match="floating point on a GPU, got torch.uint8"):
        embed(adaptor, torch.zeros(1, 3, 8, 12, dtype=torch.uint8, device="meta"))

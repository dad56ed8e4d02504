"""Patch embeddings against convolutions: torch's, transformers' classes, and a replica of timm's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BeitConfig, SwinConfig, ViTConfig
from transformers.models.beit.modeling_beit import BeitPatchEmbeddings
from transformers.models.swin.modeling_swin import SwinPatchEmbeddings as HFSwinPatchEmbeddings
from transformers.models.vit.modeling_vit import ViTPatchEmbeddings

from ofakern.errors import OfakernValueError
from ofakern.nn import CannotReplace, PatchConv2d, PatchEmbed, PatchEmbeddings, SwinPatchEmbeddings
from tests.nn.dropin import assert_replaces, assert_same_state, assert_shares, parameters_of, randomize


def image(*shape: int) -> dict[str, Tensor]:
    return {"x": torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch, bias", [(4, True), ((2, 8), False)])
def test_convolution(dtype: torch.dtype, patch: Any, bias: bool) -> None:
    """Sides that are no multiples of the patch, and an image without a batch."""
    original = randomize(nn.Conv2d(3, 8, patch, patch, bias=bias))
    assert_replaces(original, PatchConv2d, lambda m, i: m(i["x"]), image(2, 3, 17, 24), dtype)
    assert_replaces(original, PatchConv2d, lambda m, i: m(i["x"]), image(3, 8, 9), dtype)
    assert_same_state(original, PatchConv2d(3, 8, patch, patch, bias=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_embeddings(dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_channels": 3}
    for kind, config in ((ViTPatchEmbeddings, ViTConfig), (BeitPatchEmbeddings, BeitConfig)):
        original = randomize(kind(config(hidden_size=24, **sizes)))
        assert_replaces(original, PatchEmbeddings, lambda m, i: m(i["x"]), image(2, 3, 16, 16), dtype)
        assert_same_state(original, PatchEmbeddings(config(hidden_size=24, **sizes)))
    swin = randomize(HFSwinPatchEmbeddings(SwinConfig(embed_dim=24, **sizes)))
    assert_replaces(swin, SwinPatchEmbeddings, lambda m, i: m(i["x"])[0], image(2, 3, 18, 13), dtype)
    ours = SwinPatchEmbeddings.replacing(swin)
    assert ours(torch.zeros(1, 3, 18, 13))[1] == swin(torch.zeros(1, 3, 18, 13))[1] == (5, 4)
    assert_same_state(swin, SwinPatchEmbeddings(SwinConfig(embed_dim=24, **sizes)))


class Replica(nn.Module):
    """What timm's PatchEmbed computes."""

    def __init__(self, flatten: bool, norm: bool, pad: bool) -> None:
        super().__init__()
        self.img_size, self.patch_size, self.grid_size = (16, 12), (4, 4), (4, 3)
        self.flatten, self.output_fmt, self.strict_img_size, self.dynamic_img_pad = flatten, None, not pad, pad
        self.proj = nn.Conv2d(3, 24, 4, 4)
        self.norm = nn.LayerNorm(24) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.dynamic_img_pad:
            x = nn.functional.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2) if self.flatten else x)


Replica.__name__ = "PatchEmbed"


@pytest.mark.parametrize("flatten, norm, pad", [(True, True, False), (True, False, True), (False, False, False)])
def test_timms(flatten: bool, norm: bool, pad: bool) -> None:
    original = randomize(Replica(flatten, norm, pad))
    shape = (2, 3, 15, 10) if pad else (2, 3, 16, 12)
    assert_replaces(original, PatchEmbed, lambda m, i: m(i["x"]), image(*shape))
    assert_shares(original, PatchEmbed.replacing(original))
    made = PatchEmbed((16, 12), 4, 3, 24, norm_layer=nn.LayerNorm if norm else None, flatten=flatten)
    assert_same_state(original, made)
    assert made.num_patches == 12


def test_signatures() -> None:
    assert [p[0] for p in parameters_of(PatchEmbeddings.__init__)] == ["self", "config"]
    assert parameters_of(PatchEmbeddings.forward) == parameters_of(ViTPatchEmbeddings.forward)
    assert parameters_of(SwinPatchEmbeddings.forward) == parameters_of(HFSwinPatchEmbeddings.forward)
    assert parameters_of(PatchConv2d.forward) == parameters_of(nn.Conv2d.forward)


def test_refusals() -> None:
    for conv in (nn.Conv2d(3, 8, 3), nn.Conv2d(4, 8, 2, 2, groups=2), nn.Conv2d(3, 8, 4, 4, padding=1)):
        with pytest.raises(CannotReplace, match="must have stride = kernel size"):
            PatchConv2d.replacing(conv)
    with pytest.raises(OfakernValueError, match="must have stride = kernel size"):
        PatchConv2d(3, 8, 3, 2)
    with pytest.raises(OfakernValueError, match="output_fmt must be None or 'NCHW', got 'NHWC'"):
        PatchEmbed(output_fmt="NHWC")
    with pytest.raises(OfakernValueError, match=r"must be an image of \(224, 224\), got \(16, 16\)"):
        PatchEmbed()(torch.zeros(1, 3, 16, 16))
    with pytest.raises(OfakernValueError, match="sides that are multiples of"):
        PatchEmbed(strict_img_size=False)(torch.zeros(1, 3, 20, 16))
    with pytest.raises(OfakernValueError, match="must have 3 channels, got 1"):
        PatchEmbeddings(ViTConfig())(torch.zeros(1, 1, 224, 224))
    module = Replica(True, False, False)
    module.proj = nn.Linear(2, 2)
    with pytest.raises(CannotReplace, match="must be a Conv2d, got Linear"):
        PatchEmbed.replacing(module)

"""The image tokenizer; its numbers are checked against OFASys's by `ofakern parity` (tests/model/test_parity_extra)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ofakern.errors import CheckpointError, OfakernValueError
from ofakern.modality.image.vqgan import VQGAN, VQGANConfig


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SMALL = VQGANConfig(
    codes=16, embed_dim=8, resolution=16, channels=32, multipliers=(1, 2), blocks=1, attention=(8,), latent=8
)


@pytest.fixture(scope="module")
def model() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(SMALL).eval()


def test_images_to_codes_and_back(model: VQGAN) -> None:
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    codes = model.encode(images)
    assert codes.shape == (3, 64) and codes.dtype == torch.int64 and SMALL.window == 8
    assert torch.equal(codes, model.encode(images))  # nothing random
    assert torch.equal(model.decode(codes), model(images)) and model(images).shape == images.shape


def test_the_configuration_follows_from_the_weights(model: VQGAN) -> None:
    weights = model.state_dict()
    assert VQGANConfig.from_weights(weights, 16) == SMALL
    assert VQGANConfig.from_dict(SMALL.to_dict()) == SMALL
    other = VQGAN(VQGANConfig.from_weights(weights, 16))
    assert other.load_taming({**weights, "loss.discriminator.main.0.weight": torch.zeros(1)}) == [
        "loss.discriminator.main.0.weight"
    ]
    assert torch.equal(other.quantize["embed"].weight, weights["quantize.embed.weight"])


def test_training_reaches_all_parameters(model: VQGAN) -> None:
    model.train()
    try:
        (model(torch.rand(2, 3, 16, 16)) ** 2).mean().backward()  # type: ignore[no-untyped-call]
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert without == []
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()


def test_bad_input(model: VQGAN) -> None:
    weights = model.state_dict()
    with pytest.raises(OfakernValueError, match=r"S a multiple of 2, got \[1, 3, 15, 16\]"):
        model.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(OfakernValueError, match=r"a square number\], got \[1, 63\]"):
        model.decode(torch.zeros(1, 63, dtype=torch.int64))
    with pytest.raises(CheckpointError, match="1 others.*quant_conv.bias"):
        model.load_taming({k: v for k, v in weights.items() if k != "quant_conv.bias"})
    with pytest.raises(CheckpointError, match="quantize.proj.bias"):
        model.load_taming({**weights, "quantize.proj.bias": torch.zeros(15)})
    with pytest.raises(CheckpointError, match="Gumbel VQ-GAN"):
        VQGANConfig.from_weights({})
    with pytest.raises(OfakernValueError, match="channels must be a multiple of 32"):
        VQGANConfig(channels=20)

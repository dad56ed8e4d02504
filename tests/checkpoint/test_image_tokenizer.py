"""Files of image tokenizers: taming-transformers' checkpoints, safetensors, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ofakern import load_image_tokenizer
from ofakern.errors import CheckpointError
from ofakern.modality.image.vqgan import VQGAN, VQGANConfig

SMALL = VQGANConfig(
    codes=16, embed_dim=8, resolution=8, channels=32, multipliers=(1, 2), blocks=1, attention=(), latent=8
)


class Foreign:
    """A class that no checkpoint may bring along."""


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return VQGAN(SMALL).state_dict()


def test_files_that_can_be_read(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    training_only = {"loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1)}
    torch.save({"state_dict": {**weights, **training_only}, "epoch": 3}, tmp_path / "last.ckpt")
    torch.save(weights, tmp_path / "plain.pt")
    save_file(weights, tmp_path / "model.safetensors")
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    found = [load_image_tokenizer(tmp_path / n, 8) for n in ("last.ckpt", "plain.pt", "model.safetensors")]
    assert all(one.config == SMALL and not one.training for one in found)
    codes = [one.encode(image).tolist() for one in found]
    assert codes[0] == codes[1] == codes[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.ckpt", None, "path must be a file"),
        ("damaged.ckpt", b"PK\x03\x04" + bytes(100), "must be a whole torch.save file"),
        ("damaged.safetensors", bytes(100), "must be a safetensors file"),
        ("foreign.ckpt", {"state_dict": {"encoder.weight": torch.zeros(2)}}, "Gumbel VQ-GAN's, got none for"),
        ("hooked.ckpt", {"state_dict": {}, "callbacks": Foreign()}, "tensors and plain data only, got .*Foreign"),
        ("list.ckpt", {"state_dict": [1, 2]}, "must hold tensors by name, got list"),
    ],
)
def test_files_that_are_refused(name: str, content: Any, message: str, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        load_image_tokenizer(tmp_path / name)

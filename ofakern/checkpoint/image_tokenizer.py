"""The image tokenizer of a model: its file, and how it fits the adaptor that writes its codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from ofakern.checkpoint.pickles import read_pickle, tensors_of
from ofakern.errors import CheckpointError, OfakernValueError
from ofakern.modality.image.codes import ImageCodesConfig
from ofakern.modality.image.vqgan import VQGAN, VQGANConfig
from ofakern.model import OFAConfig

__all__ = ["IMAGE_CODES", "check_window", "codes_of", "codes_options", "load_image_tokenizer"]

IMAGE_CODES = "image_vqgan"


def load_image_tokenizer(path: str | Path, resolution: int = 256) -> VQGAN:
    """The Gumbel VQ-GAN of a taming-transformers checkpoint (.ckpt, .pt: its `state_dict`) or safetensors file.

    resolution: pixels along a side of the images it was trained on. Raises CheckpointError for a damaged or foreign
    file, and for a pickle that holds more than tensors and plain data.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"load_image_tokenizer: path must be a file, got {str(path)!r}")
    if file.suffix == ".safetensors":
        try:
            weights = dict(load_file(file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"load_image_tokenizer: {file} must be a safetensors file, got: {error}") from error
    else:
        data = read_pickle(file)
        weights = dict(tensors_of(data.get("state_dict", data), str(file)))
    model = VQGAN(VQGANConfig.from_weights(weights, resolution))
    model.load_taming(weights)
    return model.eval()


def codes_of(config: OFAConfig) -> int:
    """Codes of a whole image; 0 where the model writes none."""
    return sum(adaptor.window**2 for adaptor in config.adaptors if isinstance(adaptor, ImageCodesConfig))


def codes_options(tokenizer: VQGAN | None) -> dict[str, Any]:
    """Options of an adaptor for the tokenizer's codes."""
    if tokenizer is None:
        return {}
    window = tokenizer.config.window
    return {"window": window, "bucket_size": max(window, ImageCodesConfig().bucket_size)}


def check_window(config: OFAConfig, tokenizer: VQGAN | None) -> None:
    """Raises OfakernValueError when the tokenizer's grid is not the adaptor's."""
    if tokenizer is not None and tokenizer.config.window**2 != codes_of(config):
        raise OfakernValueError(
            f"GeneralistModel: window of {IMAGE_CODES!r} must be the image tokenizer's ({tokenizer.config.window}), "
            f"got {round(codes_of(config) ** 0.5)}"
        )

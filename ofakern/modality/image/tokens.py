"""Images as codes: what a row holds to int64 codes, and codes to a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ofakern.errors import DataError
from ofakern.modality.image.preprocess import FileSource, load_image
from ofakern.modality.image.vqgan import VQGAN

__all__ = ["image_codes", "picture_of"]


def image_codes(
    value: Any, tokenizer: VQGAN | None, codes: int, *, where: str = "image", files: FileSource | None = None
) -> list[int]:
    """The codes of an image, row by row: `load_image`'s values go through the tokenizer; a list or int array of codes,
    or their text ("6674 4336 ..."), is taken as it is.

    codes: how many there are. Raises DataError, naming `where`, for codes out of range and for an image without a
    tokenizer.
    """
    given = _given(value)
    if given is None:
        if tokenizer is None:
            raise DataError(f"{where}: image must be given as codes while the model has no image tokenizer")
        pixels = image_pixels(load_image(value, where=where, files=files), tokenizer.config.resolution)
        given = tokenizer.encode(pixels[None].to(next(tokenizer.parameters()).device))[0].tolist()
    if not given or min(given) < 0 or max(given) >= codes:
        raise DataError(f"{where}: codes must be in [0, {codes}), got {given[:3]}...")
    return given


def image_pixels(image: Image.Image, size: int) -> Tensor:
    """float32 `[3, size, size]` in [-1, 1]: Lanczos resize, aspect not kept."""
    resized = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1)


@torch.no_grad()
def picture_of(codes: Sequence[int], tokenizer: VQGAN) -> Image.Image:
    """The picture of a square grid of codes; ids outside the tokenizer's range take its nearest end."""
    ids = torch.tensor([codes], device=next(tokenizer.parameters()).device).clamp(0, tokenizer.config.codes - 1)
    pixels = tokenizer.decode(ids)[0].float().clamp(-1, 1).add(1).mul(127.5).round()
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def _given(value: Any) -> list[int] | None:
    """Codes that a row holds already; None when the value is something else."""
    if isinstance(value, str):
        words = value.split()
        return [int(word) for word in words] if len(words) > 1 and all(word.isdigit() for word in words) else None
    if isinstance(value, (np.ndarray, Tensor)):
        array = torch.as_tensor(value)
        if array.dim() == 1 and not array.is_floating_point():
            return [int(code) for code in array]
        return None
    if isinstance(value, (list, tuple)) and value and all(isinstance(code, int) for code in value):
        return list(value)
    return None

"""Images: from whatever a row holds (path, bytes, base64, PIL, array) to float32 `[3, S, S]`.

Source of the transform: OFA and OFASys (bicubic resize to a square, /255, mean and deviation 0.5), equal to the bit.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ofakern.errors import DataError

__all__ = ["MAX_PIXELS", "FileSource", "ImageTransform", "centre_mask", "load_image"]

MAX_PIXELS = 64_000_000
"""The largest image that is decoded (pixels); a small file may claim billions."""


class FileSource(Protocol):
    """Where file names of a row are looked up: a folder or an archive."""

    def read(self, name: str) -> bytes:
        """The file's content. Raises DataError when there is no such file."""
        ...

    def __contains__(self, name: str) -> bool:
        """Whether there is such a file."""
        ...


@dataclass(frozen=True)
class ImageTransform:
    """Resize to `size` x `size` (aspect not kept), scale to [0, 1], normalise with mean and std per channel."""

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    mask_ratio: float = 0.0

    def __call__(self, image: Image.Image) -> Tensor:
        """float32 `[3, size, size]` of an RGB image; with `mask_ratio` the centre block is zero (image infilling)."""
        resized = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        value = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
        mean, std = torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)
        return centre_mask(value.sub_(mean).div_(std), self.mask_ratio)

    def is_ready(self, value: Any) -> bool:
        """True for a floating-point `[3, size, size]` tensor or array: it is taken as already normalised."""
        if isinstance(value, Tensor):
            return value.is_floating_point() and tuple(value.shape) == (3, self.size, self.size)
        return (
            isinstance(value, np.ndarray)
            and np.issubdtype(value.dtype, np.floating)
            and value.shape == (3, self.size, self.size)
        )

    def ready(self, value: Any) -> Tensor:
        """The normalised value itself, float32, for input where `is_ready` holds."""
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        return centre_mask(tensor.to(torch.float32).clone(), self.mask_ratio)


def centre_mask(value: Tensor, ratio: float) -> Tensor:
    """Zeroes, in place, the centre block [s:S-s] whose side is `ratio` of the image's; s = int(S (1 - ratio) / 2)."""
    if ratio > 0:
        size = value.shape[-1]
        start = int(size * (1 - ratio) / 2)
        value[:, start : size - start, start : size - start] = 0
    return value


def load_image(
    value: Any, *, where: str = "image", files: FileSource | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """An RGB image from a PIL image, a path, bytes, base64 text, `{"bytes": ..., "path": ...}` or a uint8 array.

    EXIF orientation is applied; transparency is put on white. Arrays and tensors: uint8 `[H,W]`, `[H,W,3|4]` or
    `[3|4,H,W]`. files: where names are looked up first. Raises DataError, naming `where`, for a missing, corrupt or
    too large image.
    """
    image = _open(value, where, files)
    pixels = image.width * image.height
    if pixels == 0 or pixels > max_pixels:
        raise DataError(f"{where}: image must have 1 to {max_pixels} pixels, got {image.width} x {image.height}")
    try:
        return _to_rgb(ImageOps.exif_transpose(image), where)
    except DataError:
        raise
    except Exception as error:  # decoders raise almost anything on corrupt data
        raise DataError(f"{where}: image must be readable, got {_shown(value)}: {error}") from error


def _open(value: Any, where: str, files: FileSource | None) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _decode(bytes(value), value, where)
    if isinstance(value, Mapping):  # the image feature of Hugging Face datasets, not decoded
        if value.get("bytes") is not None:
            return _decode(value["bytes"], value, where)
        return _open(value.get("path"), where, files)
    if isinstance(value, Path):
        return _decode(_read_file(value, where), value, where)
    if isinstance(value, str):
        return _decode(_read_text(value, where, files), value, where)
    if isinstance(value, Tensor):
        return _from_array(value.detach().cpu().numpy(), where)
    if isinstance(value, np.ndarray):
        return _from_array(value, where)
    raise DataError(f"{where}: image must be a path, bytes, base64 text, PIL image or array, got {_shown(value)}")


def _read_text(text: str, where: str, files: FileSource | None) -> bytes:
    if text.startswith(("http://", "https://")):
        raise DataError(f"{where}: image must be local, got {_shown(text)}\nTry: download it and give its path.")
    if text.startswith("data:"):
        return _from_base64(text.partition(",")[2], where)
    if len(text) < 1024 and "\0" not in text and "\n" not in text:
        if files is not None and text in files:
            return files.read(text)
        if Path(text).is_file():
            return _read_file(Path(text), where)
        if "." in Path(text).name:  # "." is outside both base64 alphabets, so this can only be a file name
            place = "" if files is None else f" (looked in {files})"
            raise DataError(f"{where}: image must be an existing file, got {text!r}{place}")
    return _from_base64(text, where)


def _read_file(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: image must be a readable file, got {str(path)!r}: {error.strerror}") from error


def _from_base64(text: str, where: str) -> bytes:
    try:  # OFA's files mix the standard and the URL-safe alphabet
        return base64.b64decode(text.strip().replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: image must be an existing file or base64 text, got {_shown(text)}") from error


def _decode(data: bytes, value: Any, where: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # Pillow's own words are the address of the buffer
        raise DataError(f"{where}: image must be readable, got {_shown(value)}: no known image format") from error
    except Exception as error:  # DecompressionBombError and whatever a plugin raises
        raise DataError(f"{where}: image must be readable, got {_shown(value)}: {error}") from error


def _from_array(array: np.ndarray[Any, Any], where: str) -> Image.Image:
    shape = array.shape
    if array.dtype != np.uint8:
        raise DataError(
            f"{where}: image array must be uint8, or float [3, S, S] of the model's image size (already normalised), "
            f"got {array.dtype} {shape}"
        )
    if array.ndim == 3 and shape[0] in (3, 4) and shape[2] not in (3, 4):
        array = array.transpose(1, 2, 0)
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise DataError(f"{where}: image array must be [H, W], [H, W, 3|4] or [3|4, H, W], got {shape}")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    mode = image.mode
    if mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it at 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if mode == "F":
        raise DataError(f"{where}: image must have 8 or 16 bits per channel, got floating point")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _shown(value: Any) -> str:
    if isinstance(value, (str, Path)):
        text = str(value)
        return repr(text if len(text) <= 80 else text[:77] + "...")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes"
    if isinstance(value, Mapping):
        return repr(value.get("path") or f"keys {sorted(map(str, value))}")
    return type(value).__name__

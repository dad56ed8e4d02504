"""Videos: from whatever a row holds (a file, frames, images) to float32 `[frames, 3, S, S]`.

Source of the transform: OFASys (evaluation): shorter side to S, centre crop, ImageNet's mean and deviation. Frames come
from equal parts of the whole clip: the middle of each, in training a random place of each.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from ofakern.errors import DataError, OfakernRuntimeError
from ofakern.modality.image.preprocess import FileSource, load_image

__all__ = ["VideoTransform", "frame_places", "load_frames"]

_IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
# Containers that Pillow reads frame by frame; everything else is decoded by PyAV.
_ANIMATED = {".gif", ".webp", ".apng", ".png", ".tif", ".tiff"}


@dataclass(frozen=True)
class VideoTransform:
    """The shorter side of every frame becomes `size` pixels, then the centre `size` x `size` is kept and normalised."""

    size: int = 256
    frames: int = 16
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """float32 `[len(images), 3, size, size]` of RGB images."""
        pixels = np.stack([np.asarray(self._cropped(image)) for image in images])
        value = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)
        mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (self.mean, self.std))
        return value.sub_(mean).div_(std)

    def is_ready(self, value: Any) -> bool:
        """True for a floating-point `[frames, 3, size, size]` tensor or array: it is taken as already normalised."""
        shape = tuple(getattr(value, "shape", ()))
        floating = value.is_floating_point() if isinstance(value, Tensor) else _is_floating(value)
        return floating and len(shape) == 4 and shape[0] > 0 and shape[1:] == (3, self.size, self.size)

    def _cropped(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        scale = self.size / min(width, height)
        wide, high = max(self.size, round(width * scale)), max(self.size, round(height * scale))
        resized = image.convert("RGB").resize((wide, high), Image.Resampling.BILINEAR)
        left, top = (wide - self.size) // 2, (high - self.size) // 2
        return resized.crop((left, top, left + self.size, top + self.size))


def frame_places(count: int, wanted: int, rng: np.random.Generator | None = None) -> list[int]:
    """Which of `count` frames are taken: one of each of `wanted` equal parts, its middle or (with rng) any place.

    A clip of fewer frames repeats some.
    """
    inside = np.full(wanted, 0.5) if rng is None else rng.random(wanted)
    places = ((np.arange(wanted) + inside) * count / wanted).astype(int).clip(0, count - 1)
    return [int(place) for place in places]


def load_frames(
    value: Any,
    wanted: int,
    *,
    where: str = "video",
    files: FileSource | None = None,
    rng: np.random.Generator | None = None,
) -> list[Image.Image]:
    """`wanted` frames of a video, as RGB images.

    value: a video file (path or bytes; PyAV decodes it), an animated image, a folder of images (in the order of their
    names), a list of images (whatever `load_image` reads), or a uint8 array `[frames, H, W, 3]` or `[frames, 3, H, W]`.
    files: where names are looked up first. Raises DataError, naming `where`, for a missing, corrupt or empty video;
    OfakernRuntimeError where PyAV is needed and not installed.
    """
    if isinstance(value, (Tensor, np.ndarray)):
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        if array.ndim != 4:
            raise DataError(f"{where}: video array must have four dimensions, got shape {array.shape}")
        return _chosen(list(array), wanted, where, files, rng)
    if isinstance(value, Image.Image):
        return _animation(value, wanted, where, rng)
    if isinstance(value, (list, tuple)):
        return _chosen(value, wanted, where, files, rng)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _decoded(bytes(value), "", wanted, where, rng)
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return _decoded(value["bytes"], str(value.get("path") or ""), wanted, where, rng)
    if isinstance(value, (str, Path)):
        return _named(value, wanted, where, files, rng)
    raise DataError(f"{where}: video must be a path, bytes, images or a uint8 array, got {type(value).__name__}")


def _named(
    name: str | Path, wanted: int, where: str, files: FileSource | None, rng: np.random.Generator | None
) -> list[Image.Image]:
    path = Path(name)
    if files is not None and str(name) in files:
        return _decoded(files.read(str(name)), str(name), wanted, where, rng)
    if path.is_dir():
        images = sorted(file for file in path.iterdir() if file.suffix.lower() in _IMAGES)
        return _chosen(images, wanted, where, None, rng)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        place = "" if files is None else f" (looked in {files})"
        raise DataError(f"{where}: video must be an existing file or folder, got {str(name)[:80]!r}{place}") from error
    return _decoded(data, path.name, wanted, where, rng)


def _chosen(
    images: Sequence[Any], wanted: int, where: str, files: FileSource | None, rng: np.random.Generator | None
) -> list[Image.Image]:
    if not images:
        raise DataError(f"{where}: video must have at least one frame, got none")
    return [
        load_image(images[i], where=f"{where}, frame {i}", files=files) for i in frame_places(len(images), wanted, rng)
    ]


def _decoded(data: bytes, name: str, wanted: int, where: str, rng: np.random.Generator | None) -> list[Image.Image]:
    if Path(name).suffix.lower() in _ANIMATED or data[:4] == b"GIF8":
        return _animation(load_animation(data, where), wanted, where, rng)
    av = _pyav(where)
    try:
        count = _count(av, data)
        if count == 0:
            raise DataError(f"{where}: video must have at least one frame, got none")
        places = frame_places(count, wanted, rng)
        found = {number: frame.to_image() for number, frame in _frames(av, data) if number in set(places)}
    except DataError:
        raise
    except Exception as error:  # decoders raise almost anything on corrupt data
        raise DataError(f"{where}: video must be readable, got {len(data)} bytes: {error}") from error
    if not found:
        raise DataError(f"{where}: video must have frames that can be decoded, got none of {count}")
    last = max(found)  # a damaged end: the last good frame stands for what is lost
    return [found[place] if place in found else found[last] for place in places]


def load_animation(data: bytes, where: str) -> Image.Image:
    """An image file of one or more frames."""
    try:
        return Image.open(io.BytesIO(data))
    except Exception as error:
        raise DataError(f"{where}: video must be readable, got {len(data)} bytes: no known image format") from error


def _animation(image: Image.Image, wanted: int, where: str, rng: np.random.Generator | None) -> list[Image.Image]:
    count = getattr(image, "n_frames", 1)
    places = frame_places(count, wanted, rng)
    try:
        wanted_frames = set(places)
        frames = enumerate(ImageSequence.Iterator(image))
        found = {number: frame.convert("RGB") for number, frame in frames if number in wanted_frames}
    except Exception as error:
        raise DataError(f"{where}: video must be readable, got a damaged image: {error}") from error
    return [found[place] for place in places]


def _pyav(where: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise OfakernRuntimeError(
            f"{where}: PyAV must be installed to decode a video file, got none\nTry: pip install 'ofakern[video]', or "
            "give the frames as images"
        ) from error
    return av


def _count(av: Any, data: bytes) -> int:
    """Frames of the video stream: what the container says, else what it holds."""
    with av.open(io.BytesIO(data)) as container:
        stream = next(iter(container.streams.video), None)
        if stream is None:
            return 0
        return stream.frames or sum(1 for packet in container.demux(stream) if packet.size)


def _frames(av: Any, data: bytes) -> Iterator[tuple[int, Any]]:
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_type = "AUTO"
        yield from enumerate(container.decode(video=0))


def _is_floating(value: Any) -> bool:
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating)

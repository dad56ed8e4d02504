"""MOTION values of a row: from a file, text, array or `Motion` to the features of a clip."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ofakern.errors import DataError, OfakernValueError
from ofakern.modality.image.preprocess import FileSource
from ofakern.modality.motion.features import MotionCoder
from ofakern.modality.motion.skeleton import Motion, Skeleton

__all__ = ["MotionClip", "MotionSettings", "encode_motion", "load_motion"]

PERSON = 1.7  # metres, the height that a skeleton is taken to have


@dataclass(frozen=True)
class MotionSettings:
    """What all motions of a model share; saved with it.

    skeleton: the HIERARCHY part of a BVH file, "" before it is known. scale: its unit in metres; frame_time: seconds.
    max_frames: most frames of a clip. drop_prompt: share of training samples whose text slots are emptied, so that
    generation can be guided away from what no text gives.
    """

    skeleton: str = ""
    scale: float = 1.0
    frame_time: float = 1 / 30
    max_frames: int = 1000
    drop_prompt: float = 0.1

    def __post_init__(self) -> None:
        if not (self.scale > 0 and self.frame_time > 0 and self.max_frames > 0 and 0 <= self.drop_prompt <= 1):
            raise OfakernValueError(
                f"MotionSettings: scale, frame_time, max_frames must be positive and drop_prompt in [0, 1], got {self}"
            )

    @classmethod
    def of(cls, motion: Motion, **kwargs: Any) -> MotionSettings:
        """For motions like this one: its skeleton, its frame rate, and a scale that makes a person of it."""
        height = motion.skeleton.height
        scale = PERSON / height if height > 0 else 1.0
        return cls(skeleton=motion.skeleton.header(), scale=scale, frame_time=motion.frame_time, **kwargs)

    def coder(self) -> MotionCoder:
        """Raises OfakernValueError before there is a skeleton."""
        if not self.skeleton:
            raise OfakernValueError(
                "motion: skeleton must be known, got none\nTry: train on BVH files, or "
                "preprocess=PreprocessConfig(motion=MotionSettings.of(Motion.read(path)))"
            )
        return MotionCoder(Skeleton.parse(self.skeleton), self.scale)


@dataclass(frozen=True)
class MotionClip:
    """What is taken of a motion: the slot's attributes.

    sample_rate: every n-th frame; min_length, max_length: frames; window: a random run of max_length frames (training)
    instead of the first; soft_trim: both ends lose about this share of the frames, at random (training); anchor_frame:
    the frame whose heading and place become the origin.
    """

    min_length: int = 1
    max_length: int | None = None
    sample_rate: int = 1
    soft_trim: float = 0.0
    window: bool = False
    anchor_frame: int | None = None

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> MotionClip:
        """From a slot's attributes."""
        return cls(**attributes)

    def __call__(self, motion: Motion, most: int, rng: np.random.Generator | None, where: str) -> Motion:
        """rng: of training, None elsewhere. Raises DataError for a motion that is too short."""
        if self.sample_rate > 1:
            motion = motion.every(self.sample_rate, 0 if rng is None else int(rng.integers(self.sample_rate)))
        frames = motion.frames
        if rng is not None and self.soft_trim:
            room = max(len(frames) - self.min_length, 0)
            head, tail = (min(int(n), room // 2) for n in rng.poisson(self.soft_trim * len(frames), 2))
            frames = frames[head : len(frames) - tail]
        if len(frames) < self.min_length:
            raise DataError(f"{where}: motion must have at least {self.min_length} frames, got {len(frames)}")
        limit = min(most, self.max_length or most)
        start = 0
        if rng is not None and self.window and len(frames) > limit:
            start = int(rng.integers(len(frames) - limit + 1))
        return Motion(motion.skeleton, frames[start : start + limit], motion.frame_time)


def load_motion(
    value: Any, *, where: str = "motion", files: FileSource | None = None, like: MotionSettings | None = None
) -> Motion:
    """A `Motion`, the text of a BVH file, its name or path, an array `[frames, channels]` (degrees; of the skeleton and
    frame time of `like`), or a .npy or .npz file (`frames`) of one.

    files: where names are looked up first. Raises DataError, naming `where`.
    """
    if isinstance(value, Motion):
        return value
    if isinstance(value, Mapping) and value.get("frames") is not None:
        value = value["frames"]
    if isinstance(value, (Tensor, np.ndarray)):
        return _from_array(torch.as_tensor(value), where, like)
    if isinstance(value, str) and value.lstrip().startswith("HIERARCHY"):
        return Motion.parse(value, where)
    if not isinstance(value, (str, Path)):
        raise DataError(f"{where}: motion must be a BVH file or an array of frames, got {type(value).__name__}")
    data = _read(value, where, files)
    if Path(value).suffix in (".npy", ".npz"):
        return _from_array(_array(data, where), where, like)
    return Motion.parse(data.decode("utf-8", "replace"), f"{where}: {Path(value).name}")


def encode_motion(
    motion: Motion, config: MotionSettings, clip: MotionClip, rng: np.random.Generator | None, where: str
) -> Tensor:
    """The features float32 `[T, D]` of a clip of a motion, at the model's frame rate."""
    taken = clip(motion.at_rate(config.frame_time), config.max_frames, rng, where)
    if len(taken) == 0:
        raise DataError(f"{where}: motion must have frames, got none")
    features: Tensor = config.coder().encode(taken, clip.anchor_frame, where)
    return features


def _read(name: str | Path, where: str, files: FileSource | None) -> bytes:
    if files is not None and str(name) in files:
        return files.read(str(name))
    try:
        return Path(name).read_bytes()
    except (OSError, ValueError) as error:
        place = "" if files is None else f" (looked in {files})"
        raise DataError(f"{where}: motion must be an existing file, got {str(name)[:80]!r}{place}") from error


def _array(data: bytes, where: str) -> Tensor:
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        return torch.from_numpy(np.asarray(loaded["frames"] if isinstance(loaded, np.lib.npyio.NpzFile) else loaded))
    except (ValueError, KeyError, OSError, EOFError, TypeError) as error:
        raise DataError(f"{where}: motion must be an array of frames, got: {error}") from error


def _from_array(frames: Tensor, where: str, like: MotionSettings | None) -> Motion:
    if like is None or not like.skeleton:
        raise DataError(f"{where}: motion must be a BVH file while no skeleton is known, got an array")
    skeleton = Skeleton.parse(like.skeleton)
    wide = frames.to(torch.float64)
    if wide.dim() != 2 or wide.shape[1] != skeleton.channels or not bool(wide.isfinite().all()):
        raise DataError(
            f"{where}: motion array must be finite numbers [frames, {skeleton.channels}], got {list(wide.shape)}"
        )
    return Motion(skeleton, wide, like.frame_time)

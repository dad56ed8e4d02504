"""Sound: from whatever a row holds (file, bytes, array, ready frames) to a source's or a target's frames."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ofakern.errors import DataError, OfakernRuntimeError
from ofakern.modality.audio.adaptor import MEL_BINS, tokens_of
from ofakern.modality.audio.features import N_FFT, resample, sound_frames, speech_frames
from ofakern.modality.image.preprocess import FileSource

__all__ = ["AudioTransform", "load_audio", "pack_frames", "spec_augment", "speech_statistics"]

# Of a row's own words: what holds so many samples is no list of channels.
_MOST_CHANNELS = 16


@dataclass(frozen=True)
class AudioTransform:
    """What becomes of a waveform.

    rate: samples a second the model hears; speech_rate: of the speech it writes. frames_per_step: frames that make one
    value. most: tokens of a source, steps of a target. mean, std: of written speech per mel bin, taken out of targets
    (empty: nothing is).
    """

    rate: int = 16_000
    speech_rate: int = 16_000
    frames_per_step: int = 1
    most: int = 1024
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def source(
        self,
        value: Any,
        *,
        normalize: bool = False,
        widest: tuple[int, int] = (0, 0),
        rng: np.random.Generator | None = None,
        where: str = "audio",
        files: FileSource | None = None,
    ) -> Tensor:
        """f32 `[frames, F]` that a model hears. Raises DataError for sound that is unreadable, too short or too long.

        normalize: each mel bin gets mean 0 and deviation 1 over the utterance. widest: most bins and most frames that
        `spec_augment` hides, drawn with rng.
        """
        frames = _ready(value)
        if frames is None:
            frames = sound_frames(load_audio(value, self.rate, where=where, files=files), self.rate)
        if normalize and frames.shape[0]:
            frames = (frames - frames.mean(0)) / frames.std(0, correction=0).clamp(min=1e-5)
        if rng is not None and any(widest):
            frames = spec_augment(frames, rng, *widest)
        packed = pack_frames(frames, self.frames_per_step)
        tokens = tokens_of(packed.shape[0])
        if not 1 <= tokens <= self.most:
            raise DataError(
                f"{where}: sound must give 1 to {self.most} tokens, got {tokens} from {frames.shape[0]} frames of 10 ms"
            )
        return packed

    def target(self, value: Any, *, where: str = "audio", files: FileSource | None = None) -> Tensor:
        """f32 `[steps, F]` that a model is to write. Raises DataError as `source`."""
        frames = _ready(value)
        if frames is None:
            wave = load_audio(value, self.speech_rate, where=where, files=files)
            if wave.shape[0] <= N_FFT // 2:
                raise DataError(f"{where}: sound must have more than {N_FFT // 2} samples, got {wave.shape[0]}")
            frames = speech_frames(wave, self.speech_rate)
        if self.mean:
            frames = (frames - torch.tensor(self.mean)) / torch.tensor(self.std)
        packed = pack_frames(frames, self.frames_per_step)
        if not 1 <= packed.shape[0] <= self.most:
            raise DataError(f"{where}: sound must give 1 to {self.most} steps, got {packed.shape[0]}")
        return packed

    def restore(self, steps: Tensor) -> Tensor:
        """Written steps `[steps, F]` as log-mel frames f32 `[frames, 80]`."""
        frames = steps.float().reshape(-1, MEL_BINS)
        return frames * torch.tensor(self.std) + torch.tensor(self.mean) if self.mean else frames


def speech_statistics(
    values: Iterable[Any], rate: int = 16_000, *, files: FileSource | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of written speech per mel bin over all frames of `values` (anything a row may hold): what
    `PreprocessConfig(speech_mean=, speech_std=)` takes. Raises DataError for sound that cannot be used, and for none.
    """
    transform = AudioTransform(speech_rate=rate, most=1 << 62)
    count, total, squares = 0, torch.zeros(MEL_BINS, dtype=torch.float64), torch.zeros(MEL_BINS, dtype=torch.float64)
    for number, value in enumerate(values):
        frames = transform.target(value, where=f"speech_statistics: value {number}", files=files).double()
        count, total, squares = count + len(frames), total + frames.sum(0), squares + frames.square().sum(0)
    if not count:
        raise DataError("speech_statistics: values must hold at least one sound, got 0")
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=1e-10).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def pack_frames(frames: Tensor, count: int) -> Tensor:
    """`[n, F]` to `[n // count, count * F]`; frames that fill no step are dropped, as OFASys drops them."""
    if count == 1:
        return frames
    steps = frames.shape[0] // count
    return frames[: steps * count].reshape(steps, -1)


def spec_augment(frames: Tensor, rng: np.random.Generator, bins: int, length: int) -> Tensor:
    """A copy in which up to `bins` neighbouring mel bins and up to `length` frames have the utterance's mean.

    Source: Park et al. 2019, arXiv:1904.08779 (one mask of either kind).
    """
    hidden = frames.clone()
    for axis, widest in ((1, bins), (0, length)):
        width = int(rng.integers(0, min(widest, hidden.shape[axis]) + 1))
        start = int(rng.integers(0, hidden.shape[axis] - width + 1))
        hidden.narrow(axis, start, width).fill_(float(frames.mean()) if frames.numel() else 0.0)
    return hidden


def load_audio(value: Any, rate: int, *, where: str = "audio", files: FileSource | None = None) -> Tensor:
    """f32 `[N]`, mono, at `rate` samples a second, in [-1, 1].

    value: a file name, path, bytes or base64 text of anything libsndfile reads (wav, flac, ogg, mp3); a pair (samples,
    rate); `{"array": samples, "sampling_rate": rate}` or `{"bytes": ..., "path": ...}` (Hugging Face's audio feature);
    samples alone, an array or tensor `[N]` or `[channels, N]` taken to be at `rate`. Channels are averaged; integers
    are scaled by their range. files: where names are looked up first.

    Raises DataError, naming `where`, for sound that cannot be used; OfakernRuntimeError when a file is to be read and
    soundfile is not installed.
    """
    samples, own_rate = _samples(value, rate, where, files)
    if samples.size == 0 or not np.isfinite(samples).all():
        got = "none" if samples.size == 0 else "NaN or infinity"
        raise DataError(f"{where}: sound must have finite samples, got {got}")
    mono = samples if samples.ndim == 1 else samples.mean(0)
    return resample(torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32)), own_rate, rate)


def _samples(value: Any, rate: int, where: str, files: FileSource | None) -> tuple[np.ndarray[Any, Any], int]:
    """(float samples `[N]` or `[channels, N]`, their rate)."""
    if isinstance(value, Mapping):
        if value.get("array") is not None:
            return _array(value["array"], where), _rate(value.get("sampling_rate"), where)
        if value.get("bytes") is not None:
            return _decode(bytes(value["bytes"]), where)
        return _samples(value.get("path"), rate, where, files)
    if isinstance(value, tuple) and len(value) == 2:
        return _array(value[0], where), _rate(value[1], where)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _decode(bytes(value), where)
    if isinstance(value, (str, Path)):
        return _decode(_read(value, where, files), where)
    return _array(value, where), rate


def _array(value: Any, where: str) -> np.ndarray[Any, Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    array = np.asarray(value) if isinstance(value, (np.ndarray, list)) else None
    if array is None or array.dtype.kind not in "fiu" or array.ndim not in (1, 2):
        got = type(value).__name__ if array is None else f"{array.dtype} {array.shape}"
        raise DataError(f"{where}: sound must be a file, bytes, or numbers [N] or [channels, N], got {got}")
    if array.ndim == 2 and array.shape[0] > _MOST_CHANNELS:
        raise DataError(f"{where}: sound must have at most {_MOST_CHANNELS} channels, got shape {array.shape}")
    if array.dtype.kind == "u":
        raise DataError(f"{where}: sound must be signed or floating-point numbers, got {array.dtype}")
    scale = float(np.iinfo(array.dtype).max) + 1 if array.dtype.kind == "i" else 1.0
    scaled: np.ndarray[Any, Any] = array.astype(np.float32) / np.float32(scale)
    return scaled


def _rate(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise DataError(f"{where}: the sound's rate must be a positive integer, got {value!r}")
    return int(value)


def _read(value: str | Path, where: str, files: FileSource | None) -> bytes:
    text = str(value)
    if text.startswith(("http://", "https://")):
        raise DataError(f"{where}: sound must be local, got {text[:80]!r}\nTry: download it and give its path.")
    if len(text) < 1024 and "\0" not in text:
        if files is not None and text in files:
            return files.read(text)
        try:
            if Path(text).is_file():
                return Path(text).read_bytes()
        except OSError as error:
            raise DataError(f"{where}: sound must be a readable file, got {text!r}: {error.strerror}") from error
    if isinstance(value, str) and "." not in Path(text[-1024:]).name:
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            pass
    raise DataError(f"{where}: sound must be an existing file, got {text[:80]!r}")


def _decode(data: bytes, where: str) -> tuple[np.ndarray[Any, Any], int]:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there, libsndfile is not
        raise OfakernRuntimeError(
            f"{where}: soundfile must be installed to read sound files, got: {error}\nTry: pip install ofakern[audio]"
        ) from error
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{where}: sound must be readable, got {len(data)} bytes: {error}") from error
    return samples.T, int(rate)


def _ready(value: Any) -> Tensor | None:
    """Floating-point `[frames, 80]`: taken as frames that are there already."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 2 and value.shape[1] == MEL_BINS:
        return value.detach().cpu().float()
    return None

"""Waveforms to frames and back: Kaldi's filter banks for a source, log-mel frames for written speech."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.modality.audio.adaptor import MEL_BINS
from ofakern.ops.log_mel import MelConvention, kaldi, log_mel, speech_target

__all__ = ["HOP", "N_FFT", "griffin_lim", "resample", "sound_frames", "speech_frames"]

# Of written speech: OFASys's defaults, which HiFi-GAN's published vocoders share (`ops.log_mel.speech_target`).
N_FFT, HOP = 1024, 256
# Zeros of the sinc on either side of a resampled sample, and the share of the lower band that is kept.
_ZEROS, _KEPT = 6, 0.99


def sound_frames(wave: Tensor, rate: int) -> Tensor:
    """f32 `[frames, 80]`: Kaldi's log filter banks of a waveform f32 `[N]` in [-1, 1], 25 ms every 10 ms."""
    return log_mel(wave, convention=_heard(rate))


def speech_frames(wave: Tensor, rate: int) -> Tensor:
    """f32 `[N // 256 + 1, 80]`: natural logarithms of mel magnitudes of a waveform f32 `[N]`, N above 512."""
    return log_mel(wave, convention=_written(rate))


# A convention makes its tables when it is built.
@lru_cache(maxsize=8)
def _heard(rate: int) -> MelConvention:
    return kaldi(gain=32768.0, sample_rate=rate, n_mels=MEL_BINS)


@lru_cache(maxsize=8)
def _written(rate: int) -> MelConvention:
    return speech_target(sample_rate=rate)


def griffin_lim(frames: Tensor, rate: int, iterations: int = 32, seed: int = 0) -> Tensor:
    """f32 `[N]` whose `speech_frames` come near `frames` `[n, 80]`; N = (n - 1) * 256.

    The magnitudes are the filters' pseudo-inverse, the phases start at random and are made consistent in `iterations`
    rounds with momentum 0.99. Source: Griffin and Lim 1984; Perraudin et al. 2013 for the momentum.
    """
    inverse = torch.linalg.pinv(_written(rate).tables.filters).float()
    samples = (frames.shape[0] - 1) * HOP
    short = max(0, N_FFT // 2 // HOP + 2 - frames.shape[0])  # half a window is reflected at either end
    frames = torch.cat([frames, frames[-1:].expand(short, -1)]) if short else frames
    magnitude = (inverse @ frames.float().exp().t()).clamp(min=0)
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(magnitude.shape, generator=generator) * (2 * math.pi)
    phase, before = torch.polar(torch.ones_like(angles), angles), torch.zeros_like(magnitude, dtype=torch.complex64)
    for _ in range(iterations):
        rebuilt = _stft(_istft(magnitude * phase))
        phase = rebuilt - before * (0.99 / 1.99)
        phase, before = phase / phase.abs().clamp(min=1e-16), rebuilt
    return _istft(magnitude * phase)[: max(samples, 0)]


def resample(wave: Tensor, old: int, new: int) -> Tensor:
    """f32 `[N]` at `old` samples a second to `[ceil(N new / old)]` at `new`, by a windowed sinc.

    Raises OfakernValueError for rates below 1.
    """
    if min(old, new) < 1:
        raise OfakernValueError(f"resample: old and new must be at least 1 sample a second, got {old} and {new}")
    divisor = math.gcd(old, new)
    old, new = old // divisor, new // divisor
    if old == new or not wave.shape[0]:
        return wave
    kernel, width = _sinc(old, new)
    padded = torch.nn.functional.pad(wave, (width, width + old))
    found = torch.nn.functional.conv1d(padded[None, None], kernel, stride=old)[0]
    return found.t().reshape(-1)[: -(-wave.shape[0] * new // old)]


@lru_cache(maxsize=8)
def _sinc(old: int, new: int) -> tuple[Tensor, int]:
    """Filters `[new, 1, taps]`, one for each place of a new sample between old ones, and how far they reach back."""
    band = min(old, new) * _KEPT
    width = math.ceil(_ZEROS * old / band)
    places = torch.arange(-width, width + old, dtype=torch.float64) / old
    t = (places - torch.arange(new, dtype=torch.float64)[:, None] / new) * band
    window = torch.cos(t.clamp(-_ZEROS, _ZEROS) * (math.pi / _ZEROS / 2)).square()
    return (torch.sinc(t) * window * (band / old)).float()[:, None], width


def _stft(wave: Tensor) -> Tensor:
    window = torch.hann_window(N_FFT)
    return torch.stft(wave, N_FFT, HOP, window=window, center=True, pad_mode="reflect", return_complex=True)


def _istft(spectrum: Tensor) -> Tensor:
    return torch.istft(spectrum, N_FFT, HOP, window=torch.hann_window(N_FFT), center=True)

"""Waveforms to frames and back: Kaldi's filter banks for a source, log-mel frames for written speech."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.modality.audio.adaptor import MEL_BINS

__all__ = ["HOP", "N_FFT", "griffin_lim", "resample", "sound_frames", "speech_frames"]

# Of written speech: OFASys's defaults, which HiFi-GAN's published vocoders share.
N_FFT, HOP, TOP_HERTZ, FLOOR = 1024, 256, 8000.0, 1e-5
# Zeros of the sinc on either side of a resampled sample, and the share of the lower band that is kept.
_ZEROS, _KEPT = 6, 0.99


def sound_frames(wave: Tensor, rate: int) -> Tensor:
    """f32 `[frames, 80]`: Kaldi's log filter banks of a waveform f32 `[N]` in [-1, 1], 25 ms every 10 ms."""
    frame, hop = rate * 25 // 1000, rate * 10 // 1000
    if wave.shape[0] < frame:
        return wave.new_zeros((0, MEL_BINS))
    framed = wave.unfold(0, frame, hop) * 32768.0
    framed = framed - framed.mean(1, keepdim=True)
    framed = framed - 0.97 * torch.cat([framed[:, :1], framed[:, :-1]], 1)
    window = torch.hann_window(frame, periodic=False).pow(0.85)
    n_fft = 1 << (frame - 1).bit_length()
    power: Tensor = torch.fft.rfft(framed * window, n_fft).abs().square()
    return (power @ _kaldi_filters(rate, n_fft)).clamp(min=torch.finfo(torch.float32).eps).log()


def speech_frames(wave: Tensor, rate: int) -> Tensor:
    """f32 `[N // 256 + 1, 80]`: natural logarithms of mel magnitudes of a waveform f32 `[N]`, N above 512."""
    return (_stft(wave).abs().t() @ _slaney_filters(rate)).clamp(min=FLOOR).log()


def griffin_lim(frames: Tensor, rate: int, iterations: int = 32, seed: int = 0) -> Tensor:
    """f32 `[N]` whose `speech_frames` come near `frames` `[n, 80]`; N = (n - 1) * 256.

    The magnitudes are the filters' pseudo-inverse, the phases start at random and are made consistent in `iterations`
    rounds with momentum 0.99. Source: Griffin and Lim 1984; Perraudin et al. 2013 for the momentum.
    """
    magnitude = (frames.float().exp() @ torch.linalg.pinv(_slaney_filters(rate))).clamp(min=0).t()
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(magnitude.shape, generator=generator) * (2 * math.pi)
    phase, before = torch.polar(torch.ones_like(angles), angles), torch.zeros_like(magnitude, dtype=torch.complex64)
    for _ in range(iterations):
        rebuilt = _stft(_istft(magnitude * phase))
        phase = rebuilt - before * (0.99 / 1.99)
        phase, before = phase / phase.abs().clamp(min=1e-16), rebuilt
    return _istft(magnitude * phase)


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


@lru_cache(maxsize=8)
def _kaldi_filters(rate: int, n_fft: int) -> Tensor:
    """`[n_fft / 2 + 1, 80]`: triangles even in mel = 1127 ln(1 + f / 700) from 20 Hz to half the rate."""
    edges = torch.linspace(math.log1p(20.0 / 700.0), math.log1p(rate / 1400.0), MEL_BINS + 2, dtype=torch.float64)
    bins = torch.log1p(_bins(rate, n_fft) / 700.0)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    filters = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)
    filters[-1] = 0  # Kaldi's spectrum ends before half the rate
    return filters.float()


@lru_cache(maxsize=8)
def _slaney_filters(rate: int) -> Tensor:
    """`[513, 80]`: triangles in Hz with corners even in Slaney's scale from 0 to 8 kHz, each of area 1."""
    step, corner, ratio = 200.0 / 3.0, 1000.0, math.log(6.4) / 27.0
    top = corner / step + math.log(TOP_HERTZ / corner) / ratio
    mels = torch.linspace(0.0, top, MEL_BINS + 2, dtype=torch.float64)
    edges = torch.where(mels < corner / step, mels * step, corner * torch.exp(ratio * (mels - corner / step)))
    bins = _bins(rate, N_FFT)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    filters = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)
    return (filters * (2.0 / (right - left))).float()


def _bins(rate: int, n_fft: int) -> Tensor:
    return torch.arange(n_fft // 2 + 1, dtype=torch.float64) * (rate / n_fft)

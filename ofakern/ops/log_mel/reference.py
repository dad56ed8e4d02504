"""The oracle of `log_mel`: a discrete Fourier transform of gathered frames, in plain torch and any float dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def log_mel_reference(
    wave: Tensor,
    lengths: Sequence[int],
    frames: Sequence[int],
    window: Tensor,
    filters: Tensor,
    *,
    hop: int,
    n_fft: int,
    first_sample: int,
    mirror_repeats_edge: bool,
    remove_dc: bool,
    preemphasis: float,
    power: int,
    log: str,
    floor: float,
) -> Tensor:
    """`[sum(frames), n_mels]` of the waveforms `wave [sum(lengths)]`; arguments as in `MelConvention`.

    window: `[frame]` with the gain in it; filters: `[n_mels, n_fft / 2 + 1]`. Differentiable.
    """
    parts = []
    for samples, count in zip(torch.split(wave, list(lengths)), frames, strict=True):
        if count == 0:
            continue
        index = first_sample + hop * torch.arange(count)[:, None] + torch.arange(len(window))
        framed = samples[_mirrored(index, len(samples), mirror_repeats_edge).to(wave.device)]
        if remove_dc:
            framed = framed - framed.mean(1, keepdim=True)
        if preemphasis:
            framed = framed - preemphasis * torch.cat([framed[:, :1], framed[:, :-1]], 1)
        spectrum = torch.fft.rfft(framed * window.to(framed), n_fft)
        energy = spectrum.real**2 + spectrum.imag**2 if power == 2 else spectrum.abs()
        mel = (energy @ filters.to(energy).T).clamp(min=floor)
        parts.append(_whisper(mel) if log == "whisper" else mel.log())
    return torch.cat(parts) if parts else wave.new_zeros(0, len(filters))


def _mirrored(index: Tensor, length: int, repeats_edge: bool) -> Tensor:
    """Places outside [0, length) mirrored into it, as often as it takes."""
    period = 2 * length if repeats_edge else max(2 * length - 2, 1)
    index = index % period
    return torch.where(index < length, index, (2 * length - 1 if repeats_edge else period) - index)


def _whisper(mel: Tensor) -> Tensor:
    x = mel.log10()
    return (torch.maximum(x, x.max() - 8.0) + 4.0) / 4.0

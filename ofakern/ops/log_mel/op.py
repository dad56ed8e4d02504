"""The registered op `ofakern::log_mel_fwd`; arguments are checked in api.py and again by the binding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofakern.ops import native
from ofakern.ops.library import define, ops_of
from ofakern.ops.log_mel import kernel_cuda
from ofakern.ops.log_mel.convention import MelConvention

_SCHEMA = (
    "(Tensor wave, Tensor window, Tensor roots, Tensor first, Tensor offsets, Tensor weights, int[] lengths, "
    "int[] frames, int hop, int first_sample, bool mirror_repeats_edge, bool remove_dc, float preemphasis, int power, "
    "bool whisper, float floor) -> Tensor"
)
_LARGEST_FFT = 1 << 16


def limit(convention: MelConvention) -> str | None:
    """What no kernel can do of a convention, or None."""
    rest = convention.n_fft // 2
    for factor in (2, 3, 5):
        while rest % factor == 0:
            rest //= factor
    if rest != 1 or max(convention.n_fft, convention.hop) > _LARGEST_FFT:
        return f"takes an n_fft that is twice a product of 2, 3 and 5; it and the hop at most {_LARGEST_FFT}"
    return None


def run(backend: str, wave: Tensor, lengths: list[int], c: MelConvention) -> Tensor:
    """The frames of checked waveforms."""
    frames = [c.frames(n) for n in lengths]
    return _FORWARD[backend](wave, *c.tables.kernel, lengths, frames, *c.numbers)  # type: ignore[no-any-return]


def _forward_cpu(*inputs: Any) -> Any:
    return native.kernels.log_mel(*inputs, torch.get_num_threads())


def _forward_fake(wave: Tensor, *inputs: Any) -> Tensor:
    return wave.new_empty((sum(inputs[6]), inputs[2].shape[0]))


define("log_mel_fwd", _SCHEMA, cpu=_forward_cpu, cuda=kernel_cuda.forward, fake=_forward_fake)
_FORWARD = ops_of("log_mel_fwd")

"""The registered op `ofakern::log_mel_fwd`; arguments are checked in api.py and again by the binding."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ofakern.errors import BackendError
from ofakern.ops import native
from ofakern.ops.library import define, kernel_ready
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


def run(wave: Tensor, lengths: list[int], c: MelConvention) -> Tensor:
    """The frames of checked waveforms."""
    t = c.tables
    result: Tensor = torch.ops.ofakern.log_mel_fwd(
        wave,
        t.window_f32,
        t.roots,
        t.first,
        t.offsets,
        t.weights,
        lengths,
        [c.frames(n) for n in lengths],
        c.hop,
        c.first_sample,
        c.edges == "mirror",
        c.remove_dc,
        c.preemphasis,
        c.power,
        c.log == "whisper",
        c.floor,
    )
    return result


def _forward_cpu(wave: Tensor, *inputs: Any) -> Tensor:
    module, threads = native.cpu, torch.get_num_threads()
    if module is None:
        raise BackendError(f"log_mel: backend 'cpu' cannot run this call: {native.cpu_reason}")
    *tables, lengths, frames = inputs[:7]
    bounds = torch.tensor([[0, *accumulate(lengths)], [0, *accumulate(frames)]])
    ready = (kernel_ready(wave), bounds, *tables, *inputs[7:])
    out = torch.empty((sum(frames), tables[2].shape[0]), dtype=torch.float32)
    workspace = torch.empty(module.log_mel_workspace(*ready, threads), dtype=torch.uint8)
    module.log_mel_forward(out, workspace, *ready, threads)
    return out


def _forward_fake(wave: Tensor, *inputs: Any) -> Tensor:
    return wave.new_empty((sum(inputs[6]), inputs[2].shape[0]))


define("log_mel_fwd", _SCHEMA, cpu=_forward_cpu, fake=_forward_fake)

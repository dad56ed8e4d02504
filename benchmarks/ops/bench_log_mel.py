"""Cases of log_mel and its peer: the same features by torch's transform and one matrix product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import Contender, Phase, Work
from ofakern.ops.log_mel import MelConvention, kaldi, log_mel, whisper

OP = "log_mel"
OURS = "cpu"
DEVICES = ("cpu", "cuda")
HARNESS = "log_mel_rule"
PHASES: tuple[Phase, ...] = ("fwd",)
TIMED_DTYPES = ("f32",)
AGREEMENT = {"f32": 1e-5}
ABOUT = {
    "stft": "torch.stft, squared magnitudes, one product with the filters, logarithm; Kaldi's frames are taken by "
    "unfold, and their mean and preemphasis done before torch.fft.rfft; a waveform at a time"
}
_RATE = 16000
_DATA = "waveforms are data: there is no gradient"


@dataclass(frozen=True)
class Spec:
    """A case: waveforms of `seconds` each at 16 kHz."""

    name: str
    description: str
    seconds: tuple[float, ...]
    convention: MelConvention
    quick: bool = False
    default: bool = True

    @property
    def lengths(self) -> list[int]:
        return [round(_RATE * s) for s in self.seconds]

    @property
    def frames(self) -> int:
        return sum(map(self.convention.frames, self.lengths))


_WHISPER, _KALDI = whisper(), kaldi(gain=32768.0)
CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("30s", "Whisper's features of 30 s", (30.0,), _WHISPER, quick=True),
        Spec("30s_kaldi", "Kaldi's filter banks of 30 s", (30.0,), _KALDI),
        Spec("1s", "Whisper's features of 1 s", (1.0,), _WHISPER, quick=True),
        Spec("30s_b64", "Whisper's features of 64 waveforms of 30 s", (30.0,) * 64, _WHISPER, default=False),
        Spec("ragged_kaldi", "Kaldi's filter banks of 8 waveforms of 1 to 15 s", (1, 2, 3, 5, 7, 9, 12, 15), _KALDI),
    )
}


@dataclass
class Problem:
    spec: Spec
    wave: Tensor


def make(spec: Spec, dtype: str) -> Problem:
    """Noise from a fixed seed, in [-1, 1]."""
    return Problem(spec, 0.1 * torch.randn(sum(spec.lengths), generator=torch.Generator().manual_seed(1)))


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """The work of a case. Per frame of n points, in float32 operations outside matrix products:

    window 1 per sample (Kaldi: mean 2, preemphasis 2 more); the transform of n real points 2.5 n log2 n, the usual
    count; power 3 per bin; 2 per weight of a filter; 10 per logarithm. Bytes: waveform read, features written.
    """
    c = spec.convention
    framing = c.frame * (1 + 2 * c.remove_dc + 2 * (c.preemphasis > 0))
    transform = 2.5 * c.n_fft * log2(c.n_fft)
    rest = 3 * (c.n_fft // 2 + 1) + 2 * len(c.tables.kernel[-1]) + 10 * c.n_mels
    moved = 4 * (sum(spec.lengths) + spec.frames * c.n_mels)
    return Work(0.0, float(moved), {"vector": float(spec.frames * (framing + transform + rest))})


def verify(spec: Spec, dtype: str, harness: Any, backend: str = OURS) -> None:
    """Raises AssertionError when our kernel breaks the rule on the case itself."""
    problem = make(spec, dtype)
    wave = problem.wave if backend == OURS else problem.wave.cuda()
    have = _run(Problem(spec, wave), backend).cpu()
    harness.assert_right(have, problem.wave, spec.lengths, spec.convention)


def _run(problem: Problem, backend: str) -> Tensor:
    return log_mel(problem.wave, problem.spec.lengths, convention=problem.spec.convention, backend=backend)


def ours(problem: Problem, backend: str = OURS) -> Contender:
    return Contender(backend, lambda: _run(problem, backend), forward_only=_DATA)


def stft(problem: Problem) -> Contender:
    c = problem.spec.convention
    window, filters = (x.to(problem.wave) for x in (c.tables.window, c.tables.filters))

    def kaldi_power(wave: Tensor) -> Tensor:
        frames = wave.unfold(0, c.frame, c.hop)
        frames = frames - frames.mean(1, keepdim=True)
        before = torch.nn.functional.pad(frames[:, None], (1, 0), mode="replicate")[:, 0, :-1]
        return torch.fft.rfft((frames - c.preemphasis * before) * window, c.n_fft).abs().square()

    def whisper_power(wave: Tensor) -> Tensor:
        spectrum = torch.stft(wave, c.n_fft, c.hop, window=window, return_complex=True)
        return spectrum[:, :-1].abs().square().T

    def features(wave: Tensor) -> Tensor:
        if c.log == "ln":
            return (kaldi_power(wave) @ filters.T).clamp(min=c.floor).log()
        mel = (whisper_power(wave) @ filters.T).clamp(min=c.floor).log10()
        return (torch.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0

    def forward() -> Tensor:
        return torch.cat([features(wave) for wave in problem.wave.split(problem.spec.lengths)])

    return Contender("stft", forward, forward_only=_DATA)


CONTENDERS: dict[str, Callable[[Any], Contender]] = {OURS: ours, "stft": stft}

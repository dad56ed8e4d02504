"""The ways to make a log-mel spectrogram: what Kaldi, Whisper and OFASys' speech targets each mean by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log, pi
from typing import Literal

import torch
from torch import Tensor

from ofakern.errors import OfakernValueError

Edges = Literal["snip", "mirror", "reflect"]
Filters = Literal["kaldi", "slaney"]
Log = Literal["ln", "whisper"]
Window = Literal["povey", "hann"]
EDGES: tuple[Edges, ...] = ("snip", "mirror", "reflect")
LOGS: tuple[Log, ...] = ("ln", "whisper")
_KALDI_FLOOR = 1.1920928955078125e-07  # Kaldi's: float32's epsilon


@dataclass(frozen=True, kw_only=True)
class MelConvention:
    """How a waveform becomes mel frames; use `kaldi`, `whisper` or `speech_target`, or name every part.

    sample_rate: Hz; frame: samples of a frame; hop: samples from one frame to the next; n_fft: points of the transform
    (even, at least `frame`, zeros fill it); window; gain: what the waveform is multiplied with (32768 for Kaldi's
    16-bit scale when it lies in [-1, 1]).
    edges: "snip" whole frames only; "mirror" Kaldi's snip_edges=false, frames centred on (f + 1/2) hop, samples
    mirrored with the edge repeated; "reflect" frames centred on f hop, mirrored about the edge sample, which needs a
    waveform longer than frame / 2. drop_last: "reflect" without its last frame.
    remove_dc: subtract each frame's mean; preemphasis: then x[i] - preemphasis x[i-1] (x[0] its own predecessor).
    power: 2 of the spectrum's magnitude, or 1. filters: triangles even in Kaldi's mel scale, or Slaney's, normalised by
    area. n_mels from f_min to f_max Hz. log: "ln" of at least `floor`; "whisper": log10 of at least `floor`, not more
    than 8 below the waveform's largest, then (x + 4) / 4.
    """

    sample_rate: int
    frame: int
    hop: int
    n_fft: int
    window: Window
    n_mels: int
    f_min: float
    f_max: float
    filters: Filters
    edges: Edges
    log: Log
    floor: float
    power: Literal[1, 2] = 2
    gain: float = 1.0
    drop_last: bool = False
    remove_dc: bool = False
    preemphasis: float = 0.0
    tables: MelTables = field(init=False, repr=False, compare=False)
    # What a kernel takes beside the tables, in the order of the registered op.
    numbers: tuple[int | bool | float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "tables", _tables(self))
        frames = (self.hop, self.first_sample, self.edges == "mirror", self.remove_dc, self.preemphasis)
        object.__setattr__(self, "numbers", (*frames, self.power, self.log == "whisper", self.floor))

    def frames(self, length: int) -> int:
        """How many frames a waveform of `length` samples gives."""
        if self.edges == "snip":
            return 0 if length < self.frame else 1 + (length - self.frame) // self.hop
        if self.edges == "mirror":
            return (length + self.hop // 2) // self.hop
        return 0 if length == 0 else length // self.hop + (0 if self.drop_last else 1)

    @property
    def first_sample(self) -> int:
        """Where frame 0 starts: negative where it reaches before the waveform."""
        if self.edges == "snip":
            return 0
        return (self.hop // 2 if self.edges == "mirror" else 0) - self.frame // 2


@dataclass(frozen=True)
class MelTables:
    """window [frame] times gain and filters [n_mels, n_fft / 2 + 1] in float64, for the reference. kernel: window and
    the roots of unity [n_fft, 2] (cosine, sine of 2 pi k / n_fft), in float64 where frames are transformed so, and the
    filters' rows from their first to their last weight: first int32 [n_mels], offsets int32 [n_mels + 1], weights
    float32."""

    window: Tensor
    filters: Tensor
    kernel: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def kaldi(
    *,
    gain: float = 1.0,
    sample_rate: int = 16000,
    n_mels: int = 80,
    f_min: float = 20.0,
    f_max: float | None = None,
    snip_edges: bool = True,
) -> MelConvention:
    """Kaldi's `compute-fbank-feats`: 25 ms every 10 ms, Povey window, preemphasis 0.97, no dither, natural logarithm.

    The waveform is taken in Kaldi's 16-bit scale; gain=32768 for one in [-1, 1]. f_max None: half the sample rate.
    """
    frame = sample_rate * 25 // 1000
    return MelConvention(
        sample_rate=sample_rate,
        frame=frame,
        hop=sample_rate * 10 // 1000,
        n_fft=1 << (frame - 1).bit_length(),
        window="povey",
        n_mels=n_mels,
        f_min=f_min,
        f_max=sample_rate / 2 if f_max is None else f_max,
        filters="kaldi",
        edges="snip" if snip_edges else "mirror",
        log="ln",
        floor=_KALDI_FLOOR,
        gain=gain,
        remove_dc=True,
        preemphasis=0.97,
    )


def whisper(*, n_mels: int = 80) -> MelConvention:
    """Whisper's: 16 kHz in [-1, 1], 400 points every 160, Slaney mels, log10 within 8 of the maximum.

    Whisper itself cuts or fills a waveform to 30 s first (3000 frames); that is the caller's.
    """
    return MelConvention(
        sample_rate=16000,
        frame=400,
        hop=160,
        n_fft=400,
        window="hann",
        n_mels=n_mels,
        f_min=0.0,
        f_max=8000.0,
        filters="slaney",
        edges="reflect",
        log="whisper",
        floor=1e-10,
        drop_last=True,
    )


def speech_target(*, sample_rate: int = 22050) -> MelConvention:
    """What OFASys's speech synthesis predicts: 1024 points every 256, magnitudes, 80 Slaney mels to 8 kHz, ln."""
    return MelConvention(
        sample_rate=sample_rate,
        frame=1024,
        hop=256,
        n_fft=1024,
        window="hann",
        n_mels=80,
        f_min=0.0,
        f_max=8000.0,
        filters="slaney",
        edges="reflect",
        log="ln",
        floor=1e-5,
        power=1,
    )


def _check(c: MelConvention) -> None:
    positive = {"sample_rate": c.sample_rate, "frame": c.frame, "hop": c.hop, "n_mels": c.n_mels, "floor": c.floor}
    rules: list[tuple[str, bool, str, object]] = [(n, value > 0, "be positive", value) for n, value in positive.items()]
    rules += [
        ("n_fft", c.n_fft >= c.frame and c.n_fft % 2 == 0, f"be even and at least frame ({c.frame})", c.n_fft),
        ("window", c.window in ("povey", "hann"), "be 'povey' or 'hann'", c.window),
        ("filters", c.filters in ("kaldi", "slaney"), "be 'kaldi' or 'slaney'", c.filters),
        ("edges", c.edges in EDGES, f"be one of {', '.join(EDGES)}", c.edges),
        ("log", c.log in LOGS, f"be one of {', '.join(LOGS)}", c.log),
        ("power", c.power in (1, 2), "be 1 or 2", c.power),
        ("drop_last", c.edges == "reflect" or not c.drop_last, "be False unless edges is 'reflect'", c.drop_last),
        ("preemphasis", 0 <= c.preemphasis < 1, "lie in [0, 1)", c.preemphasis),
        ("f_max", 0 <= c.f_min < c.f_max <= c.sample_rate / 2, "lie above f_min, up to sample_rate / 2", c.f_max),
    ]
    for name, kept, rule, value in rules:
        if not kept:
            raise OfakernValueError(f"MelConvention: {name} must {rule}, got {value!r}")


def _tables(c: MelConvention) -> MelTables:
    window = c.gain * _window(c)
    filters = _kaldi_filters(c) if c.filters == "kaldi" else _slaney_filters(c)
    angles = torch.arange(c.n_fft, dtype=torch.float64) * (2 * pi / c.n_fft)
    first, offsets, weights = _rows(filters)
    roots = torch.stack([angles.cos(), angles.sin()], 1)
    # A logarithm without Whisper's lower end shows a quiet band beside loud ones, where float32's rounding of the loud
    # ones is as large as the band itself.
    dtype = torch.float64 if c.log == "ln" else torch.float32
    return MelTables(window, filters, (window.to(dtype), roots.to(dtype), first, offsets, weights))


def _window(c: MelConvention) -> Tensor:
    if c.window == "hann":  # periodic, as torch.stft is given it
        return torch.hann_window(c.frame, dtype=torch.float64)
    return torch.hann_window(c.frame, periodic=False, dtype=torch.float64) ** 0.85


def _kaldi_filters(c: MelConvention) -> Tensor:
    """Triangles in mel = 1127 ln(1 + f / 700); the bin of half the sample rate belongs to none."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hertz / 700.0)

    low, high = mel(torch.tensor([c.f_min, c.f_max], dtype=torch.float64))
    edges = low + (high - low) / (c.n_mels + 1) * torch.arange(c.n_mels + 2, dtype=torch.float64)
    bins = mel(_frequencies(c))
    left, centre, right = (edges[n : n + c.n_mels, None] for n in range(3))
    filters = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)
    filters[:, -1] = 0
    return filters


def _slaney_filters(c: MelConvention) -> Tensor:
    """Triangles in Hz whose corners are even in Slaney's scale (linear to 1 kHz, then logarithmic), each of area 1."""
    step, corner, ratio = 200.0 / 3.0, 1000.0, log(6.4) / 27.0

    def mel(hertz: float) -> float:
        return hertz / step if hertz < corner else corner / step + log(hertz / corner) / ratio

    mels = torch.linspace(mel(c.f_min), mel(c.f_max), c.n_mels + 2, dtype=torch.float64)
    above = corner * torch.exp(ratio * (mels - corner / step))
    edges = torch.where(mels < corner / step, mels * step, above)
    left, centre, right = (edges[n : n + c.n_mels, None] for n in range(3))
    bins = _frequencies(c)
    filters = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)
    return filters * (2.0 / (right - left))


def _frequencies(c: MelConvention) -> Tensor:
    return torch.arange(c.n_fft // 2 + 1, dtype=torch.float64) * (c.sample_rate / c.n_fft)


def _rows(filters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, weights = [], []
    for row in filters:
        used = row.nonzero().flatten()
        begin, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        first.append(begin)
        weights.append(row[begin:end].float())
    lengths = torch.tensor([0, *(len(row) for row in weights)])
    return torch.tensor(first, dtype=torch.int32), lengths.cumsum(0).int(), torch.cat(weights)

"""`log_mel`: the recorded features, the rule against float64 on every instruction set, edges, bits, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
import wave as wave_files
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from log_mel_rule import assert_right
from short import examples
from torch import Tensor

import ofakern
from ofakern.errors import BackendError, OfakernError, OfakernTypeError, OfakernValueError
from ofakern.ops.log_mel import MelConvention, kaldi, log_mel, speech_target, whisper

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/ofasys/main"

_ODD: dict[str, Any] = {
    "sample_rate": 8000,
    "frame": 25,
    "hop": 7,
    "n_fft": 60,
    "window": "hann",
    "n_mels": 5,
    "f_min": 0.0,
    "f_max": 4000.0,
    "filters": "slaney",
    "edges": "mirror",
    "log": "ln",
    "floor": 1e-5,
}
CONVENTIONS = {
    "kaldi": kaldi(gain=32768.0),
    "kaldi_mirrored": kaldi(snip_edges=False),
    "whisper": whisper(),
    "whisper_128": whisper(n_mels=128),
    "speech_target": speech_target(),
    "odd": MelConvention(**_ODD),
    "magnitude": MelConvention(**(_ODD | {"power": 1, "preemphasis": 0.9, "remove_dc": True, "edges": "snip"})),
    "n_fft_4": MelConvention(**(_ODD | {"frame": 2, "n_fft": 4, "hop": 1, "n_mels": 1})),
    "n_fft_30": MelConvention(**(_ODD | {"frame": 30, "n_fft": 30})),
}


def noise(*lengths: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(sum(lengths), generator=generator)


def recorded(name: str) -> Tensor:
    with wave_files.open(str(GOLDEN / "raw" / name)) as file:
        return torch.from_numpy(np.frombuffer(file.readframes(file.getnframes()), np.int16) / np.float32(32768))


def test_kaldi_features_of_the_recorded_waveforms() -> None:
    waves = [recorded("wav1.wav"), recorded("wav2.wav")]
    convention = kaldi(gain=32768.0)
    got = log_mel(torch.cat(waves), [len(w) for w in waves], convention=convention)
    case = np.load(GOLDEN / "asr.npz")
    counts = case["input.slot0.AUDIO.fbank_lengths"].tolist()
    assert [convention.frames(len(w)) for w in waves] == counts
    for part, want, count in zip(got.split(counts), case["input.slot0.AUDIO.fbank"], counts, strict=True):
        torch.testing.assert_close(part, torch.from_numpy(want[:count]), rtol=0, atol=1e-3)


def test_speech_targets_of_the_recorded_waveforms() -> None:
    waves = [recorded("wav1.wav"), recorded("wav2.wav")]
    convention = speech_target(sample_rate=16000)
    got = log_mel(torch.cat(waves), [len(w) for w in waves], convention=convention)
    counts = [convention.frames(len(w)) for w in waves]
    for part, want in zip(got.split(counts), np.load(GOLDEN / "tts.npz")["target"], strict=True):
        torch.testing.assert_close(part, torch.from_numpy(want[: len(part)]), rtol=0, atol=5e-5)


def test_whisper_is_torch_stft() -> None:
    x, c = noise(5000), whisper()
    spectrum = torch.stft(x.double(), 400, 160, window=torch.hann_window(400).double(), return_complex=True)
    mel = (c.tables.filters @ spectrum[:, :-1].abs() ** 2).clamp(min=1e-10).log10()
    want = (torch.maximum(mel, mel.max() - 8) + 4) / 4
    torch.testing.assert_close(log_mel(x, convention=c).double(), want.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["kaldi", "whisper", "speech_target"])
def test_errors_are_below_1e_4(name: str) -> None:
    """Of noise with a tone far above it: most bands are 80 dB below the loudest one."""
    c, time = CONVENTIONS[name], torch.arange(160_000)
    for x in (noise(160_000), 0.9 * torch.sin(0.8 * time) + 1e-4 * noise(160_000)):
        error = (log_mel(x, convention=c) - log_mel(x.double(), convention=c)).abs().max()
        assert error <= (1e-5 if c.log == "ln" else 1e-4)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_rule_on_every_instruction_set(name: str, isa: str) -> None:
    lengths = [4000, 0, 1024 + 1, 2500]
    x = noise(*lengths)
    assert_right(log_mel(x, lengths, convention=CONVENTIONS[name], backend="cpu"), x, lengths, CONVENTIONS[name])


def test_the_rule_bites() -> None:
    x = noise(3000)
    for name, c in CONVENTIONS.items():
        with pytest.raises(AssertionError):
            assert_right(log_mel(x, convention=c) + 0.01, x, [3000], c)
        with pytest.raises(AssertionError):
            assert_right(log_mel(x.roll(1), convention=c), x, [3000], c), name


@settings(max_examples=examples(25), deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 399, 400, 401, 2960])), max_size=4),
    name=st.sampled_from(["kaldi", "kaldi_mirrored", "odd", "magnitude", "n_fft_4"]),
    seed=st.integers(0, 9),
)
def test_any_lengths(lengths: list[int], name: str, seed: int) -> None:
    x, c = noise(*lengths, seed=seed), CONVENTIONS[name]
    got = log_mel(x, lengths, convention=c, backend="cpu")
    assert got.shape == (sum(map(c.frames, lengths)), c.n_mels)
    assert_right(got, x, lengths, c)


def test_a_waveform_never_sees_another() -> None:
    lengths = [3000, 2000, 2500]
    for c in (CONVENTIONS["whisper"], CONVENTIONS["kaldi_mirrored"]):
        x = noise(*lengths)
        alone = log_mel(x.split(lengths)[1], convention=c)
        x[:3000], x[5000:] = torch.nan, torch.inf
        counts = [c.frames(n) for n in lengths]
        assert torch.equal(log_mel(x, lengths, convention=c).split(counts)[1], alone)


@pytest.mark.parametrize("name", ["kaldi", "whisper"])
def test_nan_and_infinity_show(name: str, isa: str) -> None:
    x, c = noise(16000), CONVENTIONS[name]
    x[8000] = torch.nan
    got, want = log_mel(x, convention=c), log_mel(x, convention=c, backend="reference")
    assert got.isnan().any() and torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("name", ["kaldi", "whisper", "speech_target"])
def test_silence_is_the_floor(name: str, isa: str) -> None:
    c = CONVENTIONS[name]
    got = log_mel(torch.zeros(4000), convention=c)
    torch.testing.assert_close(got, log_mel(torch.zeros(4000), convention=c, backend="reference"), rtol=1e-6, atol=1e-6)


def test_bits_do_not_depend_on_threads() -> None:
    lengths = [30000, 500, 17000]
    for c in (CONVENTIONS["kaldi"], CONVENTIONS["whisper"]):
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found += [log_mel(noise(*lengths), lengths, convention=c) for _ in range(2)]
        assert all(torch.equal(found[0], other) for other in found)


def test_odd_views() -> None:
    c = CONVENTIONS["kaldi"]
    x = noise(8000)
    want = log_mel(x[::2].contiguous(), convention=c)
    assert torch.equal(log_mel(x[::2], convention=c), want)
    negative = torch._neg_view(-x[::2].contiguous())
    assert torch.equal(log_mel(negative, convention=c), want)


def test_reference_gradient() -> None:
    x = noise(40).double().requires_grad_()
    c = CONVENTIONS["odd"]
    assert torch.autograd.gradcheck(lambda w: log_mel(w, [25, 15], convention=c), (x,))


def test_opcheck_and_compile() -> None:
    x, c = noise(3000, 1000), CONVENTIONS["kaldi"]
    frames = [c.frames(3000), c.frames(1000)]
    torch.library.opcheck(
        torch.ops.ofakern.log_mel_fwd.default, (x, *c.tables.kernel, [3000, 1000], frames, *c.numbers)
    )
    compiled = torch.compile(lambda w: 2 * log_mel(w, [3000, 1000], convention=c), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), 2 * log_mel(x, [3000, 1000], convention=c))


def test_autocast_leaves_it_float32() -> None:
    x, c = noise(3000), CONVENTIONS["kaldi"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_mel(x, convention=c), log_mel(x, convention=c))
        assert log_mel(x, convention=c).dtype == torch.float32


def test_backends(capsys: pytest.CaptureFixture[str]) -> None:
    x, c = noise(3000), CONVENTIONS["kaldi"]
    text = ofakern.explain("log_mel", x.double(), convention=c)
    assert "runs on 'reference'" in text and "takes float32, got torch.float64" in text
    with pytest.raises(BackendError, match="no gradient"):
        log_mel(x.requires_grad_(), convention=c)
    assert log_mel(x, convention=c, backend="reference").requires_grad
    with torch.no_grad():
        assert log_mel(x, convention=c).shape[1] == 80
    seven = MelConvention(**(_ODD | {"n_fft": 70}))
    with pytest.raises(BackendError, match="twice a product of 2, 3 and 5"):
        log_mel(noise(300), convention=seven)
    assert log_mel(noise(300), convention=seven, backend="reference").isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_fft": 59}, "n_fft must be even and at least frame"),
        ({"hop": 0}, "hop must be positive"),
        ({"f_max": 9000.0}, "f_max must lie above f_min"),
        ({"preemphasis": 1.0}, "preemphasis must lie in"),
        ({"edges": "wrap"}, "edges must be one of snip, mirror, reflect"),
        ({"drop_last": True}, "drop_last must be False"),
    ],
)
def test_conventions_that_are_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OfakernValueError, match=message):
        MelConvention(**(_ODD | changes))


def test_bad_arguments() -> None:
    c = CONVENTIONS["whisper"]
    with pytest.raises(OfakernTypeError, match="wave must be a floating-point tensor, got torch.int16"):
        log_mel(torch.zeros(3000, dtype=torch.int16), convention=c)
    with pytest.raises(OfakernTypeError, match="convention must be a MelConvention"):
        log_mel(torch.zeros(3000), convention="whisper")  # type: ignore[arg-type]
    with pytest.raises(OfakernValueError, match=r"wave must be \[N\].*got \[1, 3000\]"):
        log_mel(torch.zeros(1, 3000), convention=c)
    with pytest.raises(OfakernValueError, match="sum to 3000"):
        log_mel(torch.zeros(3000), [1000], convention=c)
    with pytest.raises(OfakernValueError, match="at least 201"):
        log_mel(torch.zeros(200), convention=c)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_results_are_written_whole(name: str, isa: str, cpu: Any) -> None:
    """Into memory full of NaN, with a workspace full of it."""
    x, c = noise(2000, 0, 1500), CONVENTIONS[name]
    lengths = [2000, 0, 1500]
    frames = [c.frames(n) for n in lengths]
    bounds = torch.tensor([[0, *accumulate(counts)] for counts in (lengths, frames)])
    given = (x, bounds, *c.tables.kernel, *c.numbers, 1)
    out = torch.full((sum(frames), c.n_mels), torch.nan)
    scratch = torch.full((cpu.log_mel_workspace(*given),), 255, dtype=torch.uint8)
    cpu.log_mel_forward(out, scratch, *given)
    assert torch.equal(out, log_mel(x, lengths, convention=c))


def test_the_binding_checks_again(cpu: Any) -> None:
    x, c = noise(3000), CONVENTIONS["kaldi"]
    _, roots, first, offsets, weights = c.tables.kernel
    good: list[Any] = [x, torch.tensor([[0, 3000], [0, 17]]), *c.tables.kernel, *c.numbers, 1]
    size = cpu.log_mel_workspace(*good)
    out, scratch = torch.empty(17, 80), torch.empty(size, dtype=torch.uint8)
    cpu.log_mel_forward(out, scratch, *good)
    wrong: list[tuple[str, int, Any]] = [
        ("wave must", 0, x.double()),
        ("bounds must have B", 1, torch.zeros(2, 0, dtype=torch.int64)),
        (r"bounds\[0\] must end at 3000", 1, torch.tensor([[0, 2999], [0, 17]])),
        (r"bounds\[1\] must rise", 1, torch.tensor([[0, 3000], [3, 2]])),
        (r"bounds\[1\] must have no frame", 1, torch.tensor([[0, 0, 3000], [0, 1, 2]])),
        ("n_fft must", 3, roots[:14].contiguous()),
        ("first must keep", 4, first + 300),
        ("offsets must rise", 5, offsets.flip(0).contiguous()),
        ("offsets must end", 5, offsets.clamp(max=3)),
        ("weights must", 6, weights[::2]),
        ("hop must", 7, 0),
        ("power must", 12, 3),
        ("threads must", 15, 0),
    ]
    for message, place, value in wrong:
        with pytest.raises(OfakernError, match=message):
            cpu.log_mel_workspace(*good[:place], value, *good[place + 1 :])
    with pytest.raises(OfakernError, match="workspace must"):
        cpu.log_mel_forward(out, scratch[:64], *good)
    with pytest.raises(OfakernError, match="out must"):
        cpu.log_mel_forward(out[:16], scratch, *good)


WORKERS = """
import torch
from torch.utils.data import DataLoader, Dataset
from ofakern.ops.attention import AttentionLayout, attention, intervals
from ofakern.ops.log_mel import kaldi, log_mel

x, convention = torch.randn(20000), kaldi()

class Waves(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, n):
        return log_mel(x, convention=convention)

torch.set_num_threads(1)
layout = AttentionLayout.build(intervals.causal([200]), [200], [200])
q = torch.randn(200, 4, 32)
attention(q, q, q, layout, backend="cpu")
want = Waves()[0]
for threads in (1, 2):
    workers = DataLoader(Waves(), batch_size=None, num_workers=2, multiprocessing_context="fork",
                         worker_init_fn=lambda n: torch.set_num_threads(threads))
    assert all(torch.equal(got, want) for got in workers)
print("alive")
"""


@pytest.mark.usefixtures("cpu")
def test_forked_workers_after_the_parent_ran_a_kernel() -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", WORKERS],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0 and "alive" in done.stdout, done.stderr

"""log_mel in CUDA C++: the rule of the CPU's kernel, on an emulated GPU and on a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from log_mel_rule import assert_right
from test_log_mel import CONVENTIONS, noise
from torch import Tensor

import ofakern
from ofakern.errors import BackendError, OfakernRuntimeError, OfakernValueError
from ofakern.ops import native
from ofakern.ops.log_mel import MelConvention, log_mel


def on(device: torch.device, wave: Tensor, lengths: list[int], convention: MelConvention) -> Tensor:
    return log_mel(wave.to(device), lengths, convention=convention, backend="cuda").cpu()


@pytest.mark.parametrize("name", CONVENTIONS)
def test_kernel_keeps_the_rule(cuda_device: torch.device, name: str) -> None:
    """Frames that reach over both ends, waveforms without a frame, more frames than a warp takes."""
    lengths = [1100, 0, 1024 + 1, 2100]
    wave, convention = noise(*lengths), CONVENTIONS[name]
    if convention.hop < 10:
        lengths = [30, 0, 31, 90]
        wave = noise(*lengths)
    assert_right(on(cuda_device, wave, lengths, convention), wave, lengths, convention)


def test_many_frames(cuda_device: torch.device) -> None:
    seconds = 30 if cuda_device.type == "cuda" else 1
    for name in ("kaldi", "whisper"):
        wave = noise(16000 * seconds)
        have = on(cuda_device, wave, [16000 * seconds], CONVENTIONS[name])
        assert_right(have, wave, [16000 * seconds], CONVENTIONS[name])


def test_more_waveforms_than_a_launch_takes(cuda_device: torch.device) -> None:
    convention, lengths = CONVENTIONS["odd"], [20 + n for n in range(50)]
    wave = noise(*lengths)
    assert_right(on(cuda_device, wave, lengths, convention), wave, lengths, convention)


def test_whispers_range_is_each_waveforms_own(cuda_device: torch.device) -> None:
    convention, lengths = CONVENTIONS["whisper"], [900, 1700]
    wave = noise(*lengths)
    wave[:900] *= 1e4
    assert_right(on(cuda_device, wave, lengths, convention), wave, lengths, convention)


@pytest.mark.parametrize("name", ["kaldi", "whisper"])
def test_nan_shows_where_it_is_heard(cuda_device: torch.device, name: str) -> None:
    convention = CONVENTIONS[name]
    wave, lengths = noise(1200, 900), [1200, 900]
    wave[600] = torch.nan
    have = on(cuda_device, wave, lengths, convention)
    want = log_mel(wave, lengths, convention=convention, backend="reference")
    assert have.isnan().any() and torch.equal(have.isnan(), want.isnan())


@pytest.mark.parametrize("name", ["kaldi", "whisper", "speech_target"])
def test_silence_is_the_floor(cuda_device: torch.device, name: str) -> None:
    wave, convention = torch.zeros(1100), CONVENTIONS[name]
    want = log_mel(wave, convention=convention, backend="reference")
    torch.testing.assert_close(on(cuda_device, wave, [1100], convention), want, rtol=1e-6, atol=1e-6)


def test_the_same_bits_every_time(cuda_device: torch.device) -> None:
    wave, lengths = noise(2000, 900), [2000, 900]
    for name in ("kaldi_mirrored", "whisper"):
        first = on(cuda_device, wave, lengths, CONVENTIONS[name])
        for seed in (2, 3):
            if cuda_device.type == "cpu":
                native.cuda_kernels.set_seed(seed)
            assert torch.equal(first, on(cuda_device, wave, lengths, CONVENTIONS[name]))


def test_results_are_all_written(cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Result and scratch start as NaN: the binding asks torch.empty for both."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan if x.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", poisoned)
    for name in ("kaldi", "whisper"):
        assert bool(on(cuda_device, noise(1500), [1500], CONVENTIONS[name]).isfinite().all())


def test_no_waveform(cuda_device: torch.device) -> None:
    for lengths in ([], [0, 0], [100]):
        assert on(cuda_device, noise(*lengths), lengths, CONVENTIONS["kaldi"]).shape == (0, 80)


def test_views_and_the_registered_op(cuda_device: torch.device) -> None:
    convention = CONVENTIONS["kaldi"]
    wave = noise(2400).to(cuda_device)
    want = log_mel(wave[::2].contiguous(), convention=convention, backend="cuda")
    assert torch.equal(log_mel(wave[::2], convention=convention, backend="cuda"), want)
    assert torch.equal(log_mel(torch._neg_view(-wave[::2]), convention=convention, backend="cuda"), want)

    def function(x: Tensor) -> Tensor:
        return 2 * log_mel(x, [1500, 900], convention=convention, backend="cuda")

    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(wave), function(wave))


def test_bad_arguments(cuda_device: torch.device) -> None:
    odd = CONVENTIONS["odd"]
    kept = {name: getattr(odd, name) for name in odd.__dataclass_fields__ if odd.__dataclass_fields__[name].init}
    wide = MelConvention(**(kept | {"n_fft": 16384}))
    with pytest.raises(OfakernValueError, match="n_fft must be at most 8192, got 16384"):
        on(cuda_device, noise(100), [100], wide)
    with pytest.raises(BackendError, match="takes float32"):
        log_mel(noise(2000).double().to(cuda_device), convention=odd, backend="cuda")


def test_a_failed_launch_returns_nothing(cuda_device: torch.device) -> None:
    if cuda_device.type != "cpu":
        pytest.skip("failures are made by the emulator")
    native.cuda_kernels.fail_next_launch(700)
    with pytest.raises(OfakernRuntimeError, match="CUDA kernel log_mel_frames<.*>: not launched: an earlier"):
        on(cuda_device, noise(1000), [1000], CONVENTIONS["kaldi"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_without_a_gpu_the_reason_is_told() -> None:
    with pytest.raises(BackendError, match="backend 'cuda' cannot run this call: "):
        log_mel(noise(1000), convention=CONVENTIONS["kaldi"], backend="cuda")
    assert "cuda" in ofakern.explain("log_mel", noise(1000), convention=CONVENTIONS["kaldi"])

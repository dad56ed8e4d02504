"""Sound to frames: the recorded numbers, everything a row may hold, and every way it can be wrong."""

from __future__ import annotations

import base64
import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from ofakern.errors import DataError, OfakernRuntimeError, OfakernValueError
from ofakern.modality.audio.features import griffin_lim, resample, sound_frames, speech_frames
from ofakern.modality.audio.preprocess import AudioTransform, load_audio, pack_frames, spec_augment, speech_statistics

MAIN = Path(__file__).parents[1] / "golden" / "ofasys" / "main"
WAVES = [MAIN / "raw" / name for name in ("wav1.wav", "wav2.wav")]


def recorded(case: str, key: str) -> list[np.ndarray[Any, Any]]:
    with np.load(MAIN / f"{case}.npz") as arrays:
        slot = "input.slot0" if case == "asr" else "input.slot1"
        lengths = arrays[f"{slot}.AUDIO.fbank_lengths"]
        return [frames[:n] for frames, n in zip(arrays[key], lengths, strict=True)]


def test_heard_frames_are_those_of_kaldi() -> None:
    for path, expected in zip(WAVES, recorded("asr", "input.slot0.AUDIO.fbank"), strict=True):
        frames = AudioTransform().source(path).numpy()
        assert frames.shape == expected.shape
        assert np.linalg.norm(frames - expected) <= 1e-5 * np.linalg.norm(expected)
        assert np.abs(frames - expected).max() <= 1e-3  # of logarithms: the quietest bins


def test_written_frames_are_those_of_ofasys() -> None:
    for path, expected in zip(WAVES, recorded("tts", "target"), strict=True):
        frames = AudioTransform().target(str(path)).numpy()
        assert frames.shape == expected.shape
        assert np.abs(frames - expected).max() <= 1e-4


def tone(rate: int, hertz: float, seconds: float = 0.25) -> Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize(("old", "new"), [(8000, 16000), (22050, 16000), (16000, 22050), (44100, 16000)])
def test_resampling_keeps_a_tone(old: int, new: int) -> None:
    found = resample(tone(old, 1000.0), old, new)
    assert found.shape[0] == math.ceil(old * 0.25 // 1 * new / old)
    inner = slice(new // 50, -new // 50)  # its ends see silence
    expected = tone(new, 1000.0, 0.3)[: found.shape[0]]
    assert (found[inner] - expected[inner]).abs().max() < 5e-3


def test_resampling_down_removes_what_no_longer_fits() -> None:
    high = resample(tone(44100, 12000.0), 44100, 16000)
    assert high[400:-400].abs().max() < 0.02
    with pytest.raises(OfakernValueError, match="at least 1 sample"):
        resample(high, 0, 16000)


def as_flac(wave: np.ndarray[Any, Any], rate: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="FLAC")
    return buffer.getvalue()


def test_everything_a_row_may_hold(tmp_path: Path) -> None:
    whole = (tone(16000, 440.0).numpy() * 20000).astype(np.int16)
    expected = torch.from_numpy(whole.astype(np.float32) / 32768)
    data = as_flac(whole, 16000)
    path = tmp_path / "tone.flac"
    path.write_bytes(data)

    class Files:
        def read(self, name: str) -> bytes:
            return data

        def __contains__(self, name: str) -> bool:
            return name == "inside.flac"

    values: list[Any] = [
        path,
        str(path),
        data,
        base64.b64encode(data).decode(),
        whole,
        expected,
        expected.numpy().astype(np.float64),
        np.stack([whole, whole]),
        (whole, 16000),
        {"array": expected.numpy(), "sampling_rate": 16000},
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(path)},
        "inside.flac",
    ]
    for value in values:
        found = load_audio(value, 16000, files=Files())
        assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-7), type(value)
    assert load_audio((whole, 8000), 16000).shape[0] == 2 * len(whole)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere.wav", "must be an existing file, got 'nowhere.wav'"),
        (Path("/nowhere/at/all.wav"), "must be an existing file"),
        ("https://example.org/a.wav", "must be local"),
        (b"RIFF and then nothing", "must be readable, got 21 bytes"),
        (3, "must be a file, bytes, or numbers"),
        (None, "must be a file, bytes, or numbers"),
        (np.zeros(0, np.float32), "must have finite samples, got none"),
        (np.array([0.0, np.nan], np.float32), "got NaN or infinity"),
        (np.zeros(8, np.uint8), "must be signed or floating-point"),
        (np.zeros((40, 2), np.float32), "at most 16 channels"),
        ((np.zeros(8, np.float32), 0), "rate must be a positive integer, got 0"),
        ({"array": np.zeros(8, np.float32)}, "rate must be a positive integer, got None"),
    ],
)
def test_sound_that_cannot_be_used(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_audio(value, 16000, where="row 3, column 'wav'")
    assert str(caught.value).startswith("row 3, column 'wav': ")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.flac"
    path.write_bytes(as_flac(tone(16000, 440.0).numpy(), 16000)[:60])
    with pytest.raises(DataError, match="sound must"):
        load_audio(path, 16000)


def test_without_soundfile_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(OfakernRuntimeError, match=r"pip install ofakern\[audio\]"):
        load_audio(WAVES[0], 16000)
    assert load_audio(tone(16000, 440.0), 16000).shape == (4000,)  # arrays need none


def test_too_short_and_too_long() -> None:
    transform = AudioTransform(most=20)
    with pytest.raises(DataError, match="1 to 20 tokens, got 0 from 3 frames"):
        transform.source(torch.zeros(800))
    with pytest.raises(DataError, match="1 to 20 tokens, got 23 from 98 frames"):
        transform.source(torch.zeros(16000))
    with pytest.raises(DataError, match="more than 512 samples, got 512"):
        transform.target(torch.zeros(512))
    with pytest.raises(DataError, match="1 to 20 steps, got 63"):
        transform.target(torch.zeros(16000))


def test_ready_frames_normalisation_and_steps() -> None:
    frames = torch.randn(9, 80) * 3 + 5
    assert torch.equal(AudioTransform().source(frames), frames)
    assert torch.equal(AudioTransform().source(frames.numpy()), frames)
    scaled = AudioTransform().source(frames, normalize=True)
    assert scaled.mean(0).abs().max() < 1e-5 and (scaled.std(0, correction=0) - 1).abs().max() < 1e-4
    packed = AudioTransform(frames_per_step=2).target(frames)
    assert packed.shape == (4, 160) and torch.equal(packed[1], frames[2:4].flatten())
    assert torch.equal(pack_frames(frames, 1), frames)
    known = AudioTransform(frames_per_step=2, mean=(5.0,) * 80, std=(3.0,) * 80)
    assert torch.allclose(known.restore(known.target(frames)), frames[:8], atol=1e-5)


def test_statistics_of_speech() -> None:
    frames = torch.cat([AudioTransform().target(path) for path in WAVES])
    mean, std = speech_statistics(WAVES)
    assert torch.allclose(torch.tensor(mean), frames.mean(0), atol=1e-4)
    assert torch.allclose(torch.tensor(std), frames.std(0, correction=0), atol=1e-4)
    with pytest.raises(DataError, match="at least one sound, got 0"):
        speech_statistics([])
    with pytest.raises(DataError, match="value 1: sound must be an existing file"):
        speech_statistics([WAVES[0], "nowhere.wav"])


def test_spec_augment_hides_one_band_and_one_span() -> None:
    frames = torch.randn(40, 80)
    hidden = spec_augment(frames, np.random.default_rng(3), 20, 10)
    changed = hidden != frames
    bins, times = changed.all(0), changed.all(1)
    assert 0 < bins.sum() <= 20 and 0 < times.sum() <= 10
    assert torch.equal(changed, bins[None] | times[:, None])  # nothing else is touched
    assert bool((hidden[changed] == frames.mean()).all() or hidden[changed].unique().numel() <= 2)
    plain = AudioTransform().source(frames, widest=(20, 10))
    assert torch.equal(plain, frames)  # no generator: not training


def test_griffin_lim_finds_a_sound_with_these_frames() -> None:
    wave = load_audio(WAVES[0], 16000)
    frames = speech_frames(wave, 16000)
    errors = []
    for iterations in (0, 32):
        found = griffin_lim(frames, 16000, iterations)
        assert found.shape[0] == (frames.shape[0] - 1) * 256
        errors.append(float((speech_frames(found, 16000) - frames)[2:-2].abs().mean()))
    assert errors[1] < 0.6 * errors[0] and errors[1] < 0.35, errors
    assert torch.equal(griffin_lim(frames, 16000, 2), griffin_lim(frames, 16000, 2))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_griffin_lim_of_few_frames(count: int) -> None:
    found = griffin_lim(torch.zeros(count, 80), 16000, 2)
    assert found.shape == ((count - 1) * 256,) and torch.isfinite(found).all()


def test_silence_gives_finite_frames() -> None:
    assert torch.isfinite(sound_frames(torch.zeros(4000), 16000)).all()
    assert torch.isfinite(speech_frames(torch.zeros(4000), 16000)).all()
    assert sound_frames(torch.zeros(100), 16000).shape == (0, 80)

"""The audio adaptors' target half: post-net, loss, what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.errors import OfakernRuntimeError, OfakernValueError
from ofakern.modality.adaptors import build_adaptor
from ofakern.modality.audio.adaptor import (
    AudioFbankAdaptor,
    AudioFbankConfig,
    AudioFrameAdaptor,
    AudioTargetConfig,
    tokens_of,
)
from ofakern.modality.audio.criterion import guided_attention, speech_loss
from ofakern.modality.audio.postprocess import Speech
from ofakern.modality.audio.speech import Postnet, Prenet, SpeechOutput
from ofakern.nn.adaptor import SideShape

SMALL = AudioFbankConfig(max_position=32, prenet_dim=8, postnet_conv_dim=8, n_frames_per_step=2)


def shape(source: bool) -> SideShape:
    return SideShape(dim=16, heads=2, tables=1, source=source, dropout=0.0, entangle_position_embedding=False)


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def test_the_postnet_sees_a_segment_alone() -> None:
    net = randomised(Postnet(6, 5, 5, 3, 0.0)).eval()
    lengths = [7, 1, 4]
    frames = torch.randn(12, 6)
    together = net(frames, lengths)
    for part, alone in zip(together.split(lengths), frames.split(lengths), strict=True):
        assert torch.allclose(part, net(alone, [len(alone)]), atol=1e-6)
    assert net(frames[:0], []).shape == (0, 6)


def test_the_postnet_is_the_plain_stack_on_one_segment() -> None:
    net = randomised(Postnet(6, 5, 5, 3, 0.0)).eval()
    frames = torch.randn(9, 6)
    x = frames.t()[None]
    for layer in net.convolutions:
        x = layer(x)
    assert torch.allclose(net(frames, [9]), x[0].t(), atol=1e-5)


def test_batch_statistics_are_of_real_frames() -> None:
    net = Postnet(6, 5, 5, 1, 0.0).train()
    frames = torch.randn(12, 6) + 3
    net(frames, [9, 3])
    batch_norm = net.convolutions[0][1]
    convolved = [net.convolutions[0][0](part.t()[None])[0].t() for part in frames.split([9, 3])]
    assert torch.allclose(batch_norm.running_mean, 0.1 * torch.cat(convolved).mean(0), atol=1e-5)


def test_the_prenets_dropout_is_always_on() -> None:
    net = Prenet(6, 2, 64, 0.5).eval()
    x = torch.randn(20, 6).abs()
    torch.manual_seed(0)
    first = net(x)
    assert not torch.equal(first, net(x))
    torch.manual_seed(0)
    assert torch.equal(first, net(x))


def test_each_side_has_its_half() -> None:
    source, target = (build_adaptor(SMALL, shape(side)) for side in (True, False))
    assert isinstance(source, AudioFbankAdaptor) and isinstance(target, AudioFrameAdaptor)
    assert build_adaptor(AudioTargetConfig(), shape(True)) is None
    assert isinstance(build_adaptor(AudioTargetConfig(), shape(False)), AudioFrameAdaptor)
    assert target.step_shape == (160,) and source.subsample.out[0].in_features == 16 * tokens_of(160)
    with pytest.raises(OfakernValueError, match=r"at most max_position \(32\), got 33"):
        target.block_of_length(33, causal=True)
    with pytest.raises(OfakernValueError, match="kernel_size must be odd, got 4"):
        Postnet(6, 5, 4, 3, 0.0)


def plain_loss(output: SpeechOutput, frames: Tensor, last: Tensor) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(output.stop, last)
    for found in (output.feature, output.post):
        loss = loss + F.l1_loss(found, frames) + F.mse_loss(found, frames)
    return loss


def test_the_loss_is_the_mean_loss_times_the_steps() -> None:
    torch.manual_seed(0)
    output = SpeechOutput(torch.randn(7, 6, requires_grad=True), torch.randn(7, 6), torch.randn(7))
    frames, labels = torch.randn(7, 6), torch.tensor([0, 0, 1, 0, 1, -100, -100])
    sums = speech_loss(output, frames, labels)
    kept = SpeechOutput(output.feature[:5], output.post[:5], output.stop[:5])
    assert int(sums.tokens) == 5
    assert torch.allclose(sums.loss / 5, plain_loss(kept, frames[:5], labels[:5].float()))
    assert torch.allclose(sum(sums.parts.values()), sums.nll)
    sums.loss.backward()
    assert output.feature.grad is not None and not output.feature.grad[5:].any()
    heavy = speech_loss(output, frames, labels, stop_weight=3.0)
    assert heavy.parts["stop"] > sums.parts["stop"]
    with pytest.raises(OfakernValueError, match="must fit the output"):
        speech_loss(output, frames[:, :5], labels)


def test_guided_attention_is_the_mean_distance_from_the_diagonal() -> None:
    torch.manual_seed(0)
    attention = [torch.rand(4, 3), torch.rand(2, 5, requires_grad=True)]
    total, count = 0.0, 0
    for one in attention:
        steps, tokens = one.shape
        for t in range(steps):
            for s in range(tokens):
                total += float(one.detach()[t, s]) * (1 - math.exp(-((s / tokens - t / steps) ** 2) / (2 * 0.4**2)))
                count += 1
    found = guided_attention(attention)
    assert float(found.detach()) == pytest.approx(total / count, rel=1e-5)
    found.backward()
    assert attention[1].grad is not None and attention[1].grad[0, 0] == 0 < attention[1].grad[0, 4]
    with pytest.raises(OfakernValueError, match="sigma must be above 0"):
        guided_attention(attention, 0.0)


def test_speech_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import soundfile

    speech = Speech(torch.randn(20, 80) - 4, torch.rand(20), 16000)
    assert speech.seconds == pytest.approx(20 * 256 / 16000)
    speech.save_audio(tmp_path / "a.wav", iterations=1)
    samples, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 16000 and len(samples) == 19 * 256 and np.abs(samples).max() > 0
    speech.save_features(tmp_path / "a.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), speech.features.numpy())
    speech.save_picture(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(OfakernRuntimeError, match="soundfile must be installed"):
        speech.save_audio(tmp_path / "b.wav")

"""Frames written one after the other: equal to one pass over them, ended by the model, the same for a seed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ofakern.data.batch import Example, PackedBatch, Segment
from ofakern.errors import OfakernValueError
from ofakern.generate import GenerationConfig, generate_frames
from ofakern.modality.audio.adaptor import AudioFbankConfig, AudioFrameAdaptor
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import FrameWriter, OFAConfig, OFAPlus

CPU = torch.device("cpu")
CONFIG = OFAConfig(
    vocab_size=20,
    dim=32,
    ffn_dim=64,
    heads=4,
    encoder_layers=1,
    decoder_layers=2,
    dropout=0.0,
    init_std=0.3,
    adaptors=(
        TextAdaptorConfig(max_position=16, bucket_size=8),
        AudioFbankConfig(max_position=40, prenet_dim=16, prenet_dropout=0.0, postnet_conv_dim=8),
    ),
)


def network(**audio: Any) -> OFAPlus:
    text, sound = CONFIG.adaptors
    config = replace(CONFIG, adaptors=(text, replace(sound, **audio)))
    model = OFAPlus(config, seed=0).eval()
    for table in model.decoder.adaptor.adaptors["audio_fbank"].tables():
        torch.nn.init.normal_(table, std=0.5)
    return model


def source(*lengths: int) -> list[list[Segment]]:
    generator = torch.Generator().manual_seed(5)
    return [[Segment(0, "text", 1, torch.randint(4, 20, (n,), generator=generator))] for n in lengths]


def batch(segments: list[list[Segment]], frames: list[torch.Tensor]) -> PackedBatch:
    examples = []
    for own, made in zip(segments, frames, strict=True):
        value = torch.cat([torch.zeros_like(made[:1]), made[:-1]])
        labels = torch.zeros(len(made), dtype=torch.int64)
        examples.append(Example(own, [Segment(1, "audio_fbank", 4, value, len(made))], labels, frames=made))
    return PackedBatch.collate(examples)


def written(model: OFAPlus, segments: list[list[Segment]], **settings: Any) -> list[list[Any]]:
    config = GenerationConfig().replace(**{"max_new_tokens": 12, "stop_threshold": 1.0, **settings})
    memory = model.encode(batch(segments, [torch.zeros(1, 80)] * len(segments)).source)
    return generate_frames(FrameWriter(model, "audio_fbank", 4), memory, len(segments), config, CPU)


def test_written_frames_are_those_of_one_pass() -> None:
    model = network()
    segments = source(5, 3)
    writer = model.frame_adaptor("audio_fbank")
    assert isinstance(writer, AudioFrameAdaptor)
    with torch.inference_mode():
        found = written(model, segments, max_new_tokens=20)
        # The inputs of a pass are frames before the post-net, which a search does not return: grow them again.
        grown = [torch.zeros(0, 80) for _ in segments]
        for step in range(20):
            padded = [torch.cat([frames, torch.zeros(1, 80)]) for frames in grown]
            packed = batch(segments, padded)
            speech = writer.outputs(model(packed), packed.target.lengths_cpu)
            parts = speech.feature.split(packed.target.lengths_cpu)
            grown = [torch.cat([old, part[step:]]) for old, part in zip(grown, parts, strict=True)]
        refined = speech.post.split(packed.target.lengths_cpu)
        stops = speech.stop.sigmoid().split(packed.target.lengths_cpu)
    for (one,), frames, stop in zip(found, refined, stops, strict=True):
        assert torch.allclose(one.frames, frames, atol=1e-4) and torch.allclose(one.stop, stop, atol=1e-5)


def test_an_utterance_ends_where_the_model_says() -> None:
    model = network()
    segments = source(5, 3, 4)
    stops = [one.stop for (one,) in written(model, segments)]
    early = torch.cat([stop[:8] for stop in stops]).sort().values
    middle = len(early) // 2
    threshold = float(early[middle - 1 : middle + 1].mean())  # between two values: no rounding decides
    expected = []
    for stop in stops:
        hits = (stop > threshold).nonzero()[:, 0]
        expected.append(int(hits[0]) + 1 if len(hits) else 12)
    assert len(set(expected)) > 1, "the case must have utterances of different lengths"
    found = written(model, segments, stop_threshold=threshold)
    assert [len(one.frames) for (one,) in found] == expected
    for number, (one,) in enumerate(found):  # what leaves early does not disturb the others
        (alone,) = written(model, segments[number : number + 1], stop_threshold=threshold)[0]
        assert torch.allclose(alone.frames, one.frames, atol=1e-5)
    longer = written(model, segments, stop_threshold=threshold, min_new_tokens=10)
    assert all(len(one.frames) >= 10 for (one,) in longer)


def test_a_seed_gives_the_same_frames_and_leaves_the_callers_generator() -> None:
    model = network(prenet_dropout=0.5)
    segments = source(5)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again = written(model, segments, seed=3), written(model, segments, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0][0].frames, again[0][0].frames)
    assert not torch.equal(first[0][0].frames, written(model, segments, seed=4)[0][0].frames)
    one, two = written(model, segments, num_return_sequences=2, num_beams=2)[0]
    assert not torch.equal(one.frames, two.frames)


def test_what_is_refused() -> None:
    model = network()
    with pytest.raises(OfakernValueError, match="adaptor of frames must be one of"):
        FrameWriter(model, "text", 1)
    with pytest.raises(OfakernValueError, match=r"at most max_position \(40\), got 41"):
        written(model, source(3), max_new_tokens=41)
    with pytest.raises(OfakernValueError, match="stop_threshold must be in"):
        GenerationConfig(stop_threshold=2.0)
    state = model.begin_decode(model.encode(batch(source(3), [torch.zeros(1, 80)]).source), 1, 4, adaptor="audio_fbank")
    with pytest.raises(OfakernValueError, match=r"tokens must have shape \[1, 80\]"):
        state.step(torch.zeros(1, 81))

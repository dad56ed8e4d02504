"""Hearing and speaking through tasks: training, broken rows, evaluation, answers, saving."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from ofakern import GeneralistModel, Task, Trainer
from ofakern.data.batch import PackedBatch
from ofakern.errors import DataError, OfakernValueError
from ofakern.modality.audio.adaptor import AudioFbankConfig, AudioTargetConfig
from ofakern.modality.audio.postprocess import Speech
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import OFAConfig

TEXT = TextAdaptorConfig(max_position=32, bucket_size=8)
SOUND = AudioFbankConfig(max_position=32, prenet_dim=16, prenet_dropout=0.1, postnet_conv_dim=8)


def rows() -> list[dict[str, Any]]:
    """Two tones, each with its name and its phones; the last row's file does not exist."""
    time = torch.arange(3200) / 16000
    found = []
    for hertz, name, phones in ((300.0, "low", "L OW1"), (2000.0, "high", "HH AY1")):
        found.append({"wav": torch.sin(6.2832 * hertz * time) * 0.5, "text": name, "ph": phones})
    return [*found, {"wav": "nowhere.wav", "text": "low", "ph": "L OW1"}]


def model(**changes: Any) -> GeneralistModel:
    settings: dict[str, Any] = {
        "dim": 32,
        "ffn_dim": 64,
        "heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "dropout": 0.0,
        "init_std": 0.15,
        "adaptors": (TEXT, SOUND),
        **changes,
    }
    return GeneralistModel(OFAConfig(**settings), vocab_size=280, bins=0)


@pytest.fixture(scope="module")
def trained() -> tuple[GeneralistModel, Any]:
    hear = Task("hear", "[AUDIO:wav] what is it? -> [TEXT:text]", micro_batch_size=3, metrics=["wer"])
    name = Task("name", "[AUDIO:wav,freq_mask=4,time_mask=2] say it in phones -> [PHONE:ph]", micro_batch_size=3)
    say = Task(
        "say",
        "[PHONE:ph] -> [AUDIO:wav]",
        micro_batch_size=3,
        metrics={"seconds": _seconds},
        generation={"max_len": 20},
    )
    found = model()
    tasks = [task.add_dataset(rows()).add_dataset(rows(), "valid") for task in (hear, name, say)]
    trainer = Trainer(max_updates=50, learning_rate=1e-2, progress=False, log_every=1, max_broken_share=0.5)
    return found, trainer.fit(model=found, tasks=tasks)


def _seconds(predictions: Any, references: Any) -> float:
    assert all(isinstance(one, Speech) for one in predictions) and len(references) == len(predictions)
    return float(sum(one.seconds for one in predictions))


def test_all_losses_fall_and_broken_rows_are_counted(trained: tuple[GeneralistModel, Any]) -> None:
    result = trained[1]
    for name in ("hear", "name", "say"):
        losses = [record["tasks"][name]["loss"] for record in result.history if "tasks" in record]
        assert losses[-1] < 0.5 * losses[0], name
        assert result.evaluation[name]["broken"] == 1
    assert all("broken (rows 2)" in line for line in result.broken)
    assert {"nll", "l1", "mse", "stop", "seconds"} <= set(result.evaluation["say"])
    assert result.evaluation["hear"]["wer"] == 0.0


def test_answers(trained: tuple[GeneralistModel, Any]) -> None:
    found = trained[0]
    good = rows()[:2]
    assert [one.text for one in found.inference("hear", good)] == ["low", "high"]
    assert [one.text for one in found.inference("name", good)] == ["L OW1", "HH AY1"]
    spoken = found.inference("say", good)
    assert all(one.values["wav"] is one.speech for one in spoken)
    # What is written differs as the sounds do: louder in the bins of its own tone than the other's speech is.
    truth = [found.preprocess.audio.target(row["wav"]).mean(0) for row in good]
    own = truth[0] - truth[1]
    heard = [one.speech.features.mean(0) for one in spoken]
    assert all(1 <= len(one.speech.features) <= 20 and one.speech.rate == 16000 for one in spoken)
    assert float(torch.corrcoef(torch.stack([heard[0] - heard[1], own]))[0, 1]) > 0.3
    several = found.inference("say", good[0], num_return_sequences=2, beam_size=2, max_new_tokens=5)
    assert len(several) == 2 and not torch.equal(several[0].speech.features, several[1].speech.features)
    with pytest.raises(DataError, match="row 0, column 'wav': sound must be an existing file"):
        found.inference("hear", {"wav": "nowhere.wav"})


def test_a_saved_model_speaks_the_same(trained: tuple[GeneralistModel, Any], tmp_path: Path) -> None:
    trained[0].save_pretrained(tmp_path / "model")
    again = GeneralistModel.from_pretrained(tmp_path / "model")
    row = rows()[0]
    first, second = (one.inference("say", row).speech for one in (trained[0], again))
    assert torch.equal(first.features, second.features) and torch.equal(first.stop, second.stop)
    assert again.preprocess == trained[0].preprocess


def test_a_sample_alone_and_in_a_batch(trained: tuple[GeneralistModel, Any]) -> None:
    """Sounds of different lengths stand padded in one input, and nothing of the padding is seen."""
    found = trained[0]
    task = Task("hear", "[AUDIO:wav] what is it? -> [TEXT:text]")
    encode = found.example_encoder(task, "valid")
    wave = rows()[0]["wav"]
    examples = [encode({"wav": wave[:n], "text": "low"}) for n in (3200, 2000, 2400)]
    whole = PackedBatch.collate(examples)
    assert len(whole.source.segments) == 2  # all sounds in one input, all texts in another
    with torch.no_grad():
        together = found.network(whole).split(whole.target.lengths_cpu)
        for example, part in zip(examples, together, strict=True):
            assert torch.allclose(found.network(PackedBatch.collate([example])), part, atol=1e-4)


def test_a_resumed_run_gives_the_same_bits(tmp_path: Path) -> None:
    """The pre-net's dropout and the post-net's statistics included."""

    def run(name: str, resume: Path | None = None) -> GeneralistModel:
        task = Task("say", "[PHONE:ph] -> [AUDIO:wav]", micro_batch_size=2).add_dataset(rows()[:2])
        found = model()
        trainer = Trainer(max_updates=4, save_every=2, progress=False, output_dir=tmp_path / name)
        trainer.fit(model=found, tasks=[task], resume=resume)
        return found

    whole, resumed = run("whole"), run("resumed", tmp_path / "whole" / "checkpoint-00000002")
    again = resumed.network.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in whole.network.state_dict().items())
    assert any("running_mean" in key and value.any() for key, value in again.items())


def test_guided_attention_is_part_of_the_loss_where_it_is_asked_for() -> None:
    task = Task("say", "[PHONE:ph] -> [AUDIO:wav]").add_dataset(rows())
    losses = []
    for weight in (0.0, 10.0):
        found = model(adaptors=(TEXT, dataclasses.replace(SOUND, prenet_dropout=0.0, guided_attention=weight)))
        found.prepare([task])
        encode = found.example_encoder(task, "valid")
        batch = PackedBatch.collate([encode(row) for row in rows()[:2]])
        losses.append(found.train_step_loss(batch))
    plain, guided = losses
    assert "attention" not in plain.parts and guided.parts["attention"] > 0
    assert torch.allclose(guided.loss, plain.loss + guided.parts["attention"])
    (guided.loss - plain.loss.detach()).backward()
    gradient = found.network.decoder.layers[0].encoder_attn.q_proj.weight.grad
    assert gradient is not None and gradient.abs().max() > 0


def test_adaptors_left_open_follow_from_the_tasks() -> None:
    task = Task("say", "[PHONE:ph] -> [AUDIO:wav,adaptor=audio_tgt_fbank]").add_dataset(rows())
    found = GeneralistModel(dim=16, ffn_dim=16, heads=2, encoder_layers=1, decoder_layers=1, vocab_size=256, bins=0)
    found.prepare([task])
    names = [adaptor.name for adaptor in found.config.adaptors]
    assert names == ["text", "image_resnet", "audio_tgt_fbank"]
    assert found.tokenizer.vocabulary.range("phone").stop - found.tokenizer.vocabulary.range("phone").start == 4 + 3
    chosen = model(adaptors=(TEXT, AudioTargetConfig(max_position=8)))
    hear = Task("hear", "[AUDIO:wav] -> [TEXT:text]").add_dataset(rows())
    with pytest.raises(OfakernValueError, match="adaptors must include 'audio_fbank'.*\n.*leave them open"):
        chosen.prepare([hear])
    two = model(adaptors=(TEXT, SOUND, AudioTargetConfig(n_frames_per_step=2)))
    with pytest.raises(OfakernValueError, match="one n_frames_per_step"):
        two.prepare([hear])


def test_packed_frames_and_their_statistics() -> None:
    """Two frames to a step and normalised targets: what is written comes back as plain log-mel frames."""
    sound = AudioFbankConfig(max_position=32, prenet_dim=16, postnet_conv_dim=8, n_frames_per_step=2)
    config = model(adaptors=(TEXT, sound)).config
    from ofakern.data.example import PreprocessConfig

    preprocess = PreprocessConfig(speech_mean=(-4.0,) * 80, speech_std=(2.0,) * 80)
    found = GeneralistModel(config, vocab_size=256, bins=0, preprocess=preprocess)
    task = Task("say", "[TEXT:text] -> [AUDIO:wav,n_frames_per_step=2]").add_dataset(rows())
    found.prepare([task])
    example = found.example_encoder(task, "train")(rows()[0])
    assert example.frames is not None and example.frames.shape == (6, 160)
    assert not example.target[0].value[0].any() and torch.equal(example.target[0].value[1:], example.frames[:-1])
    assert example.labels.tolist() == [0, 0, 0, 0, 0, 1]
    speech = found.inference("say", {"text": "low"}, max_new_tokens=3, min_new_tokens=3).speech
    assert speech.features.shape == (6, 80) and speech.stop.shape == (3,)
    assert speech.features.mean() == pytest.approx(-4.0, abs=1.5)
    with pytest.raises(OfakernValueError, match="must both have 80 values or none"):
        PreprocessConfig(speech_mean=(1.0,))

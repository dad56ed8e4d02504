"""Training from a file and answering from the shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ofakern.cli.main import main

CONFIG = """
model:
  {dim: 32, ffn_dim: 32, heads: 2, encoder_layers: 1, decoder_layers: 1, vocab_size: 270, bins: 8,
   adaptors: {text: {max_position: 32, bucket_size: 8}}}
train: {max_updates: 2, output_dir: run, progress: false, tensorboard: false}
tasks:
  - name: copy
    instruction: "[TEXT:a] -> [TEXT:b]"
    micro_batch_size: 2
    train: rows.jsonl
    valid: [rows.jsonl]
    metrics: [accuracy]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"a": w, "b": w}) + "\n" for w in ("cat", "dog", "hen")))
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def test_train_resume_generate(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config)]) == 0
    assert "2 updates" in capsys.readouterr().out
    assert main(["train", str(config), "--resume", "--set", "train.max_updates=4"]) == 0
    checkpoint = config.parent / "run" / "checkpoint-00000004"
    assert "4 updates" in capsys.readouterr().out and checkpoint.is_dir()
    arguments = ["generate", str(checkpoint), "copy", "--data", "a=cat", "--max-new-tokens", "3"]
    assert main([*arguments, "--json", "--num-return-sequences", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and lines[0]["score"] >= lines[1]["score"] and "b" in lines[0]["values"]
    arguments[1] = str(checkpoint.parent)  # the run's folder stands for its newest checkpoint
    assert main([*arguments, "--closed-set", "yes", "no"]) == 0
    assert capsys.readouterr().out.strip() in ("yes", "no")
    searched = ["--early-stopping", "never", "--repetition-penalty", "1.2", "--suppress-tokens", "5", "6"]
    assert main([*arguments, *searched]) == 0
    whole = capsys.readouterr().out
    assert main([*arguments, *searched, "--stream"]) == 0
    assert capsys.readouterr().out == whole
    drawn = ["--do-sample", "--typical-p", "0.9", "--min-p", "0.01", "--top-k", "20", "--seed", "3", "--json"]
    assert main([*arguments, *drawn]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(line["token_log_probs"]) == len(line["tokens"])
    diverse = ["--num-beam-groups", "2", "--diversity-penalty", "1", "--num-beams"]
    assert main([*arguments, *diverse, "4"]) == 0
    assert main([*arguments, *diverse, "3"]) == 2
    assert "multiple of num_beam_groups" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "speed=3"], "--set"),
        (["--set", "train.lr=3"], "'lr'"),
        (["--set", "train.schedule=step"], "schedule"),
    ],
)
def test_mistakes_are_named(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["train", str(config), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_wrong_files(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("- 1", "tasks: 3", "{", CONFIG.replace("metrics", "metric")):
        config.write_text(text)
        assert main(["train", str(config)]) == 2
        assert "must" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert main(["generate", str(tmp_path), "copy"]) == 2
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    assert main(["generate", str(tmp_path), "copy", "--data", "img"]) == 2
    assert "NAME=VALUE" in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "generate"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        shown: Any = capsys.readouterr().out
        assert f"ofakern {command}" in shown and "example" in shown


SPEECH = """
model:
  {dim: 16, ffn_dim: 16, heads: 2, encoder_layers: 1, decoder_layers: 1, vocab_size: 270, bins: 0,
   adaptors: {text: {max_position: 32, bucket_size: 8},
              audio_fbank: {max_position: 16, prenet_dim: 8, postnet_conv_dim: 8}}}
train: {max_updates: 1, output_dir: run, progress: false, tensorboard: false}
tasks:
  - name: say
    instruction: "[TEXT:t] -> [AUDIO:a]"
    micro_batch_size: 2
    train: rows.jsonl
"""


def test_speech_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wave = [[0.1, -0.1] * 500]
    rows = [{"t": word, "a": {"array": wave, "sampling_rate": 16000}} for word in ("low", "high")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(SPEECH)
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    capsys.readouterr()
    arguments = [
        "generate",
        str(tmp_path / "run"),
        "say",
        "--data",
        "t=low",
        "--max-new-tokens",
        "4",
        "--min-new-tokens",
        "4",
    ]
    audio, picture = tmp_path / "low.wav", tmp_path / "low.png"
    assert main([*arguments, "--save-audio", str(audio), "--save-spectrogram", str(picture)]) == 0
    assert "speech of 0.06 seconds" in capsys.readouterr().out
    assert audio.read_bytes()[:4] == b"RIFF" and picture.read_bytes()[1:4] == b"PNG"
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"]["a"] == {"seconds": 0.064, "frames": 4, "rate": 16000}

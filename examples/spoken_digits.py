"""Teach one small OFA+ to hear digits and to say them, from twenty recordings (data/spoken_digits/DATA.md).

    python examples/spoken_digits.py
    python examples/spoken_digits.py --updates 40 --output quick-listen

Half of the recordings are learnt from, the other half is asked about. So few clips teach a model to recognise these
clips and one voice, no more: the point is the road from sound to text and from text to sound. Needs soundfile; writes
results.json, spoken.wav (Griffin and Lim's method on the written frames) and, with matplotlib, spoken.png to --output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ofakern import GeneralistModel, Task, Trainer
from ofakern.data.example import PreprocessConfig
from ofakern.data.readers import open_files
from ofakern.modality.audio.adaptor import AudioFbankConfig
from ofakern.modality.audio.preprocess import speech_statistics
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import OFAConfig

DATA = Path(__file__).parent / "data" / "spoken_digits"
HEAR = "[AUDIO:wav,normalize] what is said? -> [TEXT:text]"
SAY = "[TEXT:text] -> [AUDIO:wav]"


def rows(take: int) -> list[dict[str, Any]]:
    """The recordings of one take (5 or 6): file name and what is said."""
    lines = (DATA / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    labels = [json.loads(line) for line in lines]
    return [{"wav": one["file"], "text": one["text"]} for one in labels if one["file"].endswith(f"_{take}.flac")]


def tasks() -> list[Task]:
    """Hearing and saying, learnt from take 5 and judged on take 6."""
    hear = Task("hear", HEAR, files=DATA, micro_batch_size=10, metrics=["accuracy", "wer"],
                generation={"beam_size": 1, "max_len": 8})  # fmt: skip
    say = Task("say", SAY, files=DATA, micro_batch_size=10)
    return [task.add_dataset(rows(5)).add_dataset(rows(6), "valid") for task in (hear, say)]


def small_model() -> GeneralistModel:
    """Width 64, two layers on either side."""
    text = TextAdaptorConfig(max_position=64, bucket_size=16)
    audio = AudioFbankConfig(max_position=256, prenet_dim=64, postnet_conv_dim=64, prenet_dropout=0.2)
    config = OFAConfig(
        dim=64, ffn_dim=128, heads=4, encoder_layers=2, decoder_layers=2, dropout=0.0, init_std=0.08,
        adaptors=(text, audio),
    )  # fmt: skip
    mean, std = speech_statistics((row["wav"] for row in rows(5)), files=open_files(DATA))
    preprocess = PreprocessConfig(max_source_length=64, max_target_length=64, speech_mean=mean, speech_std=std)
    return GeneralistModel(config, vocab_size=300, bins=0, preprocess=preprocess)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, answers, writes the files; returns what results.json holds."""
    parser = argparse.ArgumentParser(description="Hear and say digits with one small model.")
    parser.add_argument("--updates", type=int, default=300, help="optimizer updates (default 300)")
    parser.add_argument("--output", type=Path, default=Path("spoken-digits"), help="folder for the results")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)

    model = small_model()
    trainer = Trainer(max_updates=args.updates, learning_rate=3e-3, progress=False, log_every=1)
    result = trainer.fit(model=model, tasks=tasks())
    asked = rows(5) + rows(6)
    answers = model.inference("hear", asked, files=DATA)
    heard = [{**row, "heard": answer.text} for row, answer in zip(asked, answers, strict=True)]
    speech = model.inference("say", {"text": "seven"}, max_new_tokens=64).speech
    speech.save_audio(args.output / "spoken.wav")
    try:
        speech.save_picture(args.output / "spoken.png")
    except RuntimeError as error:  # a picture is nice to have
        print(str(error).splitlines()[0])
    losses = {name: [record["tasks"][name]["loss"] for record in result.history if "tasks" in record]
              for name in ("hear", "say")}  # fmt: skip
    found = {
        "evaluation": result.evaluation,
        "heard": heard,
        "first_loss": {name: values[0] for name, values in losses.items()},
        "last_loss": {name: values[-1] for name, values in losses.items()},
        "spoken_seconds": speech.seconds,
    }
    (args.output / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    right = (
        sum(one["heard"] == one["text"] for one in heard[:10]),
        sum(one["heard"] == one["text"] for one in heard[10:]),
    )
    print(f"heard right: {right[0]} of 10 learnt recordings, {right[1]} of 10 others; {result.evaluation}")
    return found


if __name__ == "__main__":
    main()

"""Train one OFA+ on captioning, question answering and grounding together, and show what it learnt.

Three instructions of one line each, three small data sets that lie beside this file (see data/*/DATA.md for their
origins and licences), two CPU cores, a few minutes:

    python examples/demo.py
    python examples/demo.py --updates 20 --minutes 1 --output quick-look

Writes results.json, sheet.png (held-out samples with the model's answers), loss.png and the trained model to --output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_data import (
    CARD_CLASSES,
    Row,
    Rows,
    answers,
    caption_rows,
    captions,
    card_photos,
    grounding_rows,
    question_rows,
    questions,
)
from demo_report import Shown, draw_loss_curves, draw_sheet

from ofakern import GeneralistModel, Task, Trainer
from ofakern.metrics import (
    accuracy,
    best_constant_box,
    best_constant_text,
    grounding_scores,
    majority_answer,
    token_f1,
)
from ofakern.modality.image.adaptor import ImagePatchEmbedConfig, ImageResnetConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import OFAConfig
from ofakern.text import Tokenizer

CAPTION = "[IMAGE:img,adaptor=image_patch_embed] what does the image describe? -> [TEXT:cap]"
QUESTION = "[IMAGE:img,adaptor=image_patch_embed] [TEXT:question] -> [TEXT:answer,closed_set]"
GROUNDING = "[IMAGE:img] which region does the text [TEXT:card] describe? -> [BOX:box]"

IMAGE_SIZE = 64
BINS = 24  # fewer bins are learnt sooner; an edge is off by at most 1/46 of the picture


@dataclass(frozen=True)
class Held:
    """The model's answers to held-out rows of one task, with its scores and those of the best constant answer."""

    rows: Sequence[Row]
    outputs: Sequence[Any]
    scores: dict[str, Any]


def build_model(seed: int) -> GeneralistModel:
    """A small OFA+ whose vocabulary is trained on the training texts.

    Three things differ from the published sizes. Captions and questions read a picture as 64 patches of 8 x 8 pixels:
    with minutes to train, the colours of patches are learnt sooner than a convolutional backbone; grounding keeps the
    ResNet, a narrow one. Box answers need positions inside the values that attention carries, so the image adaptors
    add them to the embeddings as well.
    """
    texts = captions("train") + [text for _, text, _ in questions("train")] + list(answers()) + list(CARD_CLASSES)
    tokenizer = Tokenizer.train([*texts, CAPTION, GROUNDING], vocab_size=1200, bins=BINS)
    config = OFAConfig(
        vocab_size=len(tokenizer.vocabulary),
        dim=128,
        ffn_dim=512,
        heads=2,
        encoder_layers=2,
        decoder_layers=2,
        dropout=0.0,
        init_std=0.08,
        adaptors=(
            TextAdaptorConfig(max_position=64, bucket_size=32),
            ImagePatchEmbedConfig(
                image_height=IMAGE_SIZE,
                image_width=IMAGE_SIZE,
                patch_height=8,
                patch_width=8,
                class_token=False,
                entangle_position_embedding=True,
            ),
            ImageResnetConfig(
                resnet_type="resnet50",
                resnet_blocks=(1, 2, 2),
                resnet_width=16,
                bucket_size=8,
                entangle_position_embedding=True,
            ),
        ),
    )
    return GeneralistModel(config, tokenizer=tokenizer, image_size=IMAGE_SIZE, seed=seed)


def build_tasks(seed: int) -> list[Task]:
    """The three tasks with their training rows. Answers are one or two tokens, so their loss gets more weight.

    Captions are searched as OFASys does, by the plain sum of log-probabilities.
    """
    caption = Task("caption", CAPTION, micro_batch_size=36, weight=1.5, generation={"length_penalty": 0.0})
    caption.add_dataset(caption_rows("train", size=IMAGE_SIZE, seed=seed, passes=60), "train")
    vqa = Task("vqa", QUESTION, micro_batch_size=10, weight=1.5, closed_set=answers())
    vqa.add_dataset(question_rows("train", size=IMAGE_SIZE, seed=seed, length=200_000), "train")
    grounding = Task("grounding", GROUNDING, micro_batch_size=16)
    grounding.add_dataset(grounding_rows("train", size=IMAGE_SIZE, seed=seed, length=200_000), "train")
    return [caption, vqa, grounding]


def without(row: Row, target: str) -> Row:
    """The row as a user has it: the answer is not known."""
    return {name: value for name, value in row.items() if name != target}


def chosen(rows: Rows, limit: int) -> list[Row]:
    """At most `limit` rows at equal distances."""
    count = min(limit, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def judge_caption(model: GeneralistModel, limit: int) -> Held:
    """Token F1 on the test pictures of noto_emoji."""
    rows = chosen(caption_rows("test"), limit)
    outputs = model.inference("caption", [without(row, "cap") for row in rows], batch_size=32, max_len=16)
    truth = [row["cap"] for row in rows]
    constant = best_constant_text(captions("train"))
    scores = {
        "metric": "token F1",
        "value": token_f1([output.text for output in outputs], truth),
        "baseline": token_f1([constant] * len(rows), truth),
        "baseline_answer": constant,
        "n": len(rows),
    }
    return Held(rows, outputs, scores)


def judge_questions(model: GeneralistModel, limit: int) -> Held:
    """Accuracy on test questions of easy_vqa, spread over all of its test pictures in the repository."""
    rows = chosen(question_rows("test"), limit)
    outputs = model.inference("vqa", [without(row, "answer") for row in rows], batch_size=50)
    truth = [row["answer"] for row in rows]
    constant = majority_answer([answer for _, _, answer in questions("train")])
    scores = {
        "metric": "accuracy",
        "value": accuracy([output.text for output in outputs], truth),
        "baseline": accuracy([constant] * len(rows), truth),
        "baseline_answer": constant,
        "n": len(rows),
    }
    return Held(rows, outputs, scores)


def judge_grounding(model: GeneralistModel, limit: int) -> Held:
    """Mean IoU and accuracy at IoU 0.5 on the test photos of playing_cards."""
    rows = chosen(grounding_rows("test"), limit)
    outputs = model.inference("grounding", [without(row, "box") for row in rows], batch_size=32, num_beams=1)
    truth = [row["box"] for row in rows]
    cards = [(box, photo.picture.size) for photo in card_photos("train") for _, box in photo.single_cards()]
    share = best_constant_box([box for box, _ in cards], [size for _, size in cards])
    constant = [tuple(s * side for s, side in zip(share, row["img"].size * 2, strict=True)) for row in rows]
    ours, theirs = grounding_scores([output.box for output in outputs], truth), grounding_scores(constant, truth)
    scores = {
        "metric": "mean IoU",
        "value": ours["mean_iou"],
        "baseline": theirs["mean_iou"],
        "baseline_answer": [round(s, 3) for s in share],
        "n": len(rows),
        "acc": ours["accuracy"],
        "acc_baseline": theirs["accuracy"],
        "acc_metric": "accuracy at IoU 0.5",
    }
    return Held(rows, outputs, scores)


def spread(held: Held, count: int = 6) -> list[tuple[Row, Any]]:
    """`count` samples at equal distances: not chosen by how well they went."""
    places = [(2 * i + 1) * len(held.rows) // (2 * count) for i in range(count)]
    return [(held.rows[i], held.outputs[i]) for i in places]


def sheet_columns(found: dict[str, Held]) -> dict[str, list[Shown]]:
    """The samples of the picture sheet, six of each task."""
    captioned = [
        Shown(row["img"], "what does the image describe?", out.text, row["cap"], token_f1([out.text], [row["cap"]]) > 0)
        for row, out in spread(found["caption"])
    ]
    answered = [
        Shown(row["img"], row["question"], out.text, row["answer"], out.text == row["answer"])
        for row, out in spread(found["vqa"])
    ]
    grounded = []
    for row, out in spread(found["grounding"]):
        iou = grounding_scores([out.box], [row["box"]])["mean_iou"]
        asked = f'which region does the text "{row["card"]}" describe?'
        shown = ", ".join(f"{v:.0f}" for v in out.box)
        truth = ", ".join(f"{v:.0f}" for v in row["box"])
        grounded.append(Shown(row["img"], asked, f"{shown}  (IoU {iou:.2f})", truth, iou >= 0.5, out.box, row["box"]))
    return {"captioning": captioned, "question answering": answered, "grounding": grounded}


def print_results(results: dict[str, Any]) -> None:
    """A table of the held-out scores beside the constant answers'."""
    print(f"\n{'task':<11}{'metric':<22}{'model':>8}{'constant':>10}{'ratio':>8}{'n':>7}")
    for task in ("caption", "vqa", "grounding"):
        entry = results[task]
        lines = [(entry["metric"], entry["value"], entry["baseline"])]
        if "acc" in entry:
            lines.append((entry["acc_metric"], entry["acc"], entry["acc_baseline"]))
        for metric, value, baseline in lines:
            ratio = f"{value / baseline:.2f}x" if baseline else "-"
            print(f"{task:<11}{metric:<22}{value:>8.3f}{baseline:>10.3f}{ratio:>8}{entry['n']:>7}")
    print("\nThe constant answers are the best ones on the training split. Questions are asked over a closed set of 13")
    print("answers. Three in five of grounding's training pictures are scenes composed of cards cut from the training")
    print("photos; all testing is on the sets' own test splits, which training never saw.")


def run(updates: int, minutes: float, output: Path, seed: int, limit: int = 1000) -> dict[str, Any]:
    """Train, judge on the test splits, write the files; returns what results.json holds."""
    output.mkdir(parents=True, exist_ok=True)
    model, tasks = build_model(seed), build_tasks(seed)
    print(
        f"one OFA+ of {sum(p.numel() for p in model.network.parameters()) / 1e6:.1f} M parameters, three instructions:"
    )
    for task in tasks:
        print(f"  {task.name:<10} {task.instruction}")
    trainer = Trainer(
        max_updates=updates,
        max_seconds=minutes * 60,
        learning_rate=8e-4,
        betas=(0.9, 0.98),
        label_smoothing=0.05,
        seed=seed,
        tensorboard=False,
    )
    print(f"training: at most {updates} updates or {minutes:g} minutes, on {torch.get_num_threads()} threads")
    trained = trainer.fit(model=model, tasks=tasks)
    print(f"trained {trained.updates} updates in {trained.seconds:.0f} s; judging on the test splits")
    found = {
        "caption": judge_caption(model, limit),
        "vqa": judge_questions(model, limit),
        "grounding": judge_grounding(model, limit),
    }
    results: dict[str, Any] = {name: held.scores for name, held in found.items()}
    results |= {"seconds": round(trained.seconds, 1), "updates": trained.updates, "seed": seed}
    print_results(results)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw_sheet(sheet_columns(found), output / "sheet.png")
    draw_loss_curves(trained.history, output / "loss.png")
    model.save_pretrained(output / "model")
    print("\nwritten:")
    for name in ("results.json", "sheet.png", "loss.png", "model"):
        print(f"  {output / name}")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train one OFA+ on captioning, question answering and grounding together; show what it learnt.",
        epilog="example: python examples/demo.py --minutes 5 --output demo-output",
    )
    parser.add_argument("--updates", type=int, default=1500, help="optimizer updates at most (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=5.75, help="training minutes at most (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=1000, help="test rows per task at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights, order and scenes (default: %(default)s)")
    options = parser.parse_args(argv)
    run(options.updates, options.minutes, options.output, options.seed, options.limit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`ofakern generate MODEL INSTRUCTION`: the answer of a saved model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from PIL import Image

from ofakern.checkpoint import GeneralistModel, StreamPiece
from ofakern.errors import OfakernValueError
from ofakern.modality.audio.postprocess import Speech
from ofakern.modality.motion.skeleton import Motion
from ofakern.modality.output import Output

_EPILOG = """examples:
  ofakern generate demo-output/model caption --data img=photo.png
  ofakern generate demo-output/model "[IMAGE:img] [TEXT:q] -> [TEXT:a]" --data img=photo.png "q=what colour is it?"
  ofakern generate demo-output/model grounding --data img=photo.png card="ace of spades" --save-box boxed.png
  ofakern generate spoken-model "[TEXT:t] -> [AUDIO:a]" --data t=seven --save-audio seven.wav
  ofakern generate dance-model "[TEXT:t] -> [MOTION:m]" --data "t=martial arts" --frames 90 --save-motion kick.bvh"""

_SETTINGS: dict[str, tuple[type, str]] = {
    "num_beams": (int, "beams of the search; 1 is greedy (default: 5, or 1 for a closed set)"),
    "num_beam_groups": (int, "groups of a diverse beam search (default: 1)"),
    "diversity_penalty": (float, "what a token costs that an earlier group has just taken (default: 0)"),
    "max_new_tokens": (int, "most tokens of the answer (default: 256)"),
    "min_new_tokens": (int, "fewest tokens of the answer (default: 0)"),
    "no_repeat_ngram_size": (int, "no n-gram of free text twice; 0 allows it (default: 3 with beams)"),
    "num_return_sequences": (int, "answers, best first (default: 1)"),
    "length_penalty": (float, "rank by log-probability / tokens ** this (default: 1.0)"),
    "repetition_penalty": (float, "above 1: tokens generated already become less likely (default: 1.0)"),
    "temperature": (float, "logits are divided by it (default: 1.0)"),
    "top_k": (int, "with --do-sample: from this many best tokens; 0: all (default: 0)"),
    "top_p": (float, "with --do-sample: from the tokens that hold this probability (default: 1.0)"),
    "typical_p": (float, "with --do-sample: from the most typical tokens that hold this probability (default: 1.0)"),
    "min_p": (float, "with --do-sample: from tokens at least this times as probable as the best (default: 0)"),
    "seed": (int, "with --do-sample, and of a motion's noise (default: 0)"),
    "diffusion_steps": (int, "denoising steps of a motion (default: 50)"),
    "guidance": (float, "how far a motion is led away from what no text gives (default: 0)"),
    "frames": (int, "of a motion (default: the slot's max_length, else 120)"),
}

_EARLY: dict[str, Any] = {"true": True, "false": False, "never": "never"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="follow an instruction with a saved model",
        description="Print a saved model's answer to an instruction, or to that of a task it was trained on.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder that save_pretrained or a training run wrote")
    parser.add_argument("instruction", help="an instruction, or the name of a task")
    parser.add_argument(
        "--data", metavar="NAME=VALUE", nargs="+", default=[], help="the slots' values; an image or a sound is a file"
    )
    parser.add_argument("--closed-set", metavar="ANSWER", nargs="+", help="the only answers there are")
    parser.add_argument(
        "--all-candidates", action="store_true", help="score every answer of the closed set instead of searching"
    )
    parser.add_argument(
        "--do-sample", action="store_true", help="draw an answer at random instead of searching for the best"
    )
    parser.add_argument(
        "--early-stopping",
        choices=list(_EARLY),
        help="stop with the num_beams-th answer (true), when no beam looks better (false) or can be better (never)",
    )
    parser.add_argument("--suppress-tokens", metavar="ID", type=int, nargs="+", help="ids that are never generated")
    parser.add_argument("--stream", action="store_true", help="print the answer while it is written")
    for name, (kind, meaning) in _SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=meaning)
    parser.add_argument("--json", action="store_true", help="print one JSON object per answer: values, score, tokens")
    parser.add_argument("--save-box", metavar="FILE", help="write the image with the best answer's boxes drawn on it")
    parser.add_argument("--save-image", metavar="FILE", help="write the best answer's picture (or the sample's image)")
    parser.add_argument(
        "--save-motion", metavar="FILE", help="write the best answer's motion: .bvh, .gif or a strip of poses (.png)"
    )
    parser.add_argument("--save-audio", metavar="FILE", help="write the best answer's speech; the suffix is its format")
    parser.add_argument("--save-spectrogram", metavar="FILE", help="write a picture of the best answer's speech")


def run(args: argparse.Namespace) -> int:
    row: dict[str, str] = {}
    for item in args.data:
        name, equals, value = item.partition("=")
        if not equals:
            raise OfakernValueError(f"--data: value must be NAME=VALUE, got {item!r}")
        row[name] = value
    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    given.update({name: True for name in ("do_sample", "all_candidates") if getattr(args, name)})
    if args.early_stopping is not None:
        given["early_stopping"] = _EARLY[args.early_stopping]
    if args.suppress_tokens:
        given["suppress_tokens"] = args.suppress_tokens
    model = GeneralistModel.from_pretrained(args.model)
    stream = _print_piece if args.stream else None
    found = model.inference(args.instruction, row, closed_set=args.closed_set, stream=stream, **given)
    outputs: list[Output] = found if isinstance(found, list) else [found]
    lines = [_line(output, args.json) for output in outputs]
    if args.stream:
        print(flush=True)
        lines = [] if lines == [outputs[0].text] else lines  # that has been printed already
    for line in lines:
        print(line)
    if args.save_box:
        outputs[0].save_box(args.save_box)
    if args.save_image:
        outputs[0].save_image(args.save_image)
    if args.save_motion:
        outputs[0].save_motion(args.save_motion)
    if args.save_audio:
        outputs[0].spoken("--save-audio").save_audio(args.save_audio)
    if args.save_spectrogram:
        outputs[0].spoken("--save-spectrogram").save_picture(args.save_spectrogram)
    return 0


def _print_piece(piece: StreamPiece) -> None:
    """Only the first of several draws: they come at the same time."""
    if piece.sequence == 0:
        print(piece.text, end="", flush=True)


def _line(output: Output, as_json: bool) -> str:
    if as_json:
        values = {name: _plain(value) for name, value in output.values.items()}
        shown: dict[str, Any] = {"values": values, "score": output.score, "tokens": output.tokens}
        shown["token_log_probs"] = output.token_log_probs
        return json.dumps(shown, ensure_ascii=False)
    parts = [output.text] if output.text is not None else []
    parts += [", ".join(f"{value:.1f}" for value in box) for box in output.boxes]
    parts += [] if output.speech is None else [f"speech of {output.speech.seconds:.2f} seconds"]
    parts += [f"{value['kind']} of {value['size']}" for value in map(_plain, output.values.values()) if _is_made(value)]
    return "\t".join(parts)


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Speech):
        return value.summary()
    if isinstance(value, Motion):
        seconds = len(value) * value.frame_time
        return {"kind": "motion", "size": f"{len(value)} frames", "seconds": seconds}
    if isinstance(value, Image.Image):
        return {"kind": "picture", "size": f"{value.width} x {value.height} pixels"}
    return value


def _is_made(plain: Any) -> bool:
    return isinstance(plain, dict) and "kind" in plain

"""`ofakern train CONFIG.yaml`: one model on the tasks of a file, without a line of Python."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ofakern.checkpoint import GeneralistModel
from ofakern.errors import OfakernRuntimeError, OfakernValueError
from ofakern.modality.adaptors import adaptor_config
from ofakern.tasks import SPLITS, Task
from ofakern.train import TrainConfig, Trainer

_EPILOG = """example:
  ofakern train config.yaml --set train.max_updates=2000

config.yaml:
  model: {size: tiny, image_size: 224, vocab_size: 8192}     # or {from: run/checkpoint-00001000}
  # model may name its adaptors and their options: adaptors: {text: {max_position: 512}, image_vit: {}}
  train: {max_updates: 1000, learning_rate: 1.0e-4, output_dir: run}
  tasks:
    - name: caption
      instruction: "[IMAGE:img] what does the image describe? -> [TEXT:cap]"
      micro_batch_size: 8
      files: images.zip            # where the rows' file names are looked up
      train: train.jsonl           # .jsonl .json .csv .tsv, relative to this file
      valid: valid.jsonl
      metrics: [token_f1]"""

_INTERRUPTED = 130


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a model on the tasks of a YAML file",
        description="Train one model on all tasks of a file at once; Ctrl-C saves a checkpoint first.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in train.output_dir")
    parser.add_argument(
        "--set", metavar="PART.NAME=VALUE", action="append", default=[], help="change a value of model or train"
    )


def run(args: argparse.Namespace) -> int:
    config = _read_yaml(args.config.read_text(encoding="utf-8"), str(args.config))
    for change in args.set:
        _change(config, change)
    unknown = sorted(set(config) - {"model", "train", "tasks"})
    if unknown or not isinstance(config.get("tasks"), list):
        raise OfakernValueError(f"{args.config}: keys must be model, train and tasks (a list), got {sorted(config)}")
    folder = args.config.resolve().parent
    settings = dict(config.get("train") or {})
    if settings.get("output_dir") is not None:
        settings["output_dir"] = folder / settings["output_dir"]
    trainer = Trainer(TrainConfig.from_dict(settings))
    result = trainer.fit(
        model=_model(dict(config.get("model") or {}), folder),
        tasks=[_task(dict(task), folder) for task in config["tasks"]],
        resume=args.resume,
    )
    for line in result.broken:
        print(line)
    print(f"{result.updates} updates in {result.seconds:.0f} s; last checkpoint: {result.checkpoint}")
    return _INTERRUPTED if result.interrupted else 0


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise OfakernRuntimeError(
            "ofakern train: PyYAML must be installed, got none\nTry: pip install 'ofakern[train]'"
        ) from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise OfakernValueError(f"{where}: file must be YAML, got: {error}") from error
    if not isinstance(data, dict):
        raise OfakernValueError(f"{where}: file must hold model, train and tasks, got {type(data).__name__}")
    return data


def _change(config: dict[str, Any], change: str) -> None:
    path, equals, value = change.partition("=")
    part, dot, name = path.partition(".")
    if not (equals and dot and part in ("model", "train")):
        raise OfakernValueError(f"--set: value must be model.NAME=VALUE or train.NAME=VALUE, got {change!r}")
    read = _read_yaml(f"value: {value}", "--set")
    config[part] = {**(config.get(part) or {}), name: read["value"]}


def _model(options: dict[str, Any], folder: Path) -> GeneralistModel:
    if "from" not in options:
        if isinstance(options.get("adaptors"), Mapping):
            chosen = options["adaptors"].items()
            options["adaptors"] = tuple(adaptor_config(name, dict(values or {})) for name, values in chosen)
        return GeneralistModel(**options)
    path = folder / options.pop("from")
    if options:
        raise OfakernValueError(f"model: nothing must stand beside from, got {sorted(options)}")
    return GeneralistModel.from_pretrained(path)


def _task(options: dict[str, Any], folder: Path) -> Task:
    data: Mapping[str, Any] = {split: options.pop(split) for split in SPLITS if split in options}
    columns, header = options.pop("columns", None), options.pop("header", None)
    if options.get("files") is not None:
        options["files"] = folder / options["files"]
    try:
        task = Task(**options)
    except TypeError as error:
        raise OfakernValueError(f"tasks: keys must be Task's arguments and splits, got: {error}") from error
    for split, path in data.items():
        for one in path if isinstance(path, list) else [path]:
            task.add_dataset(folder / one, split, columns=columns, header=header)
    return task

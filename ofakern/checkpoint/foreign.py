"""Checkpoints of other systems as a configuration, a tokenizer and weights of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ofakern.checkpoint.ledger import Ledger
from ofakern.checkpoint.ofa_files import read_fairseq, read_hf_folder
from ofakern.checkpoint.ofasys import EMBEDDING, config_from_ofasys, load_ofasys_weights
from ofakern.checkpoint.parts import Account, Foreign, match_rows
from ofakern.checkpoint.pickles import read_pickle, tensors_of
from ofakern.errors import CheckpointError, OfakernValueError
from ofakern.model import OFAPlus
from ofakern.text import Tokenizer, Vocabulary

__all__ = ["Account", "Foreign", "read_foreign"]

_BPE_FILES = ("encoder.json", "vocab.bpe")


def read_foreign(
    path: Path, *, bpe: str | Path | None = None, tokenizer: Tokenizer | None = None, compat: str = ""
) -> Foreign:
    """Reads a checkpoint file of OFASys's or OFA's trainer (fairseq), or a folder in OFA's Hugging Face format.

    bpe: folder with GPT-2's `encoder.json` and `vocab.bpe` (for OFA's fairseq files also `dict.txt`), which the file
    itself does not hold; default: its own folder, which for the Hugging Face format holds `vocab.json` and
    `merges.txt`. tokenizer: instead; the vocabulary's rows are then matched by symbol. compat: "ofasys", "ofa_hf"
    for their quirks.
    Raises CheckpointError for a damaged or foreign file, or one that this model cannot hold.
    """
    if path.is_dir():
        return read_hf_folder(path, bpe, tokenizer, compat)
    if not path.is_file():
        raise CheckpointError(f"from_pretrained: {path} must be a saved model or a checkpoint file, got neither")
    data = read_pickle(path)
    if "model" in data and "configstore" not in data and (data.get("args") or data.get("cfg")):
        return read_fairseq(path, data, bpe, tokenizer)
    missing = {"model", "configstore", "global_dict_indices"} - set(data)
    if missing:
        raise CheckpointError(
            f"from_pretrained: {path} must be a checkpoint of OFASys's or OFA's trainer, "
            f"got no {', '.join(sorted(missing))}"
        )
    try:
        return _ofasys(path, data, bpe, tokenizer, compat)
    except (AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"from_pretrained: the config store and dictionary of {path} must be OFASys's, got: {error!r}"
        ) from error


def _ofasys(
    path: Path, data: Mapping[str, Any], bpe: str | Path | None, tokenizer: Tokenizer | None, compat: str
) -> Foreign:
    weights = tensors_of(data["model"], str(path))
    symbols = _symbols(path, data["global_dict_indices"])
    models = data["configstore"].get("model") or {}
    if len(models) != 1:
        raise CheckpointError(
            f"from_pretrained: {path} must configure one model in its config store, got {sorted(models)}"
            "\nTry: a checkpoint of a run started from OFASys's command line; as a library it stores no configuration"
        )
    if EMBEDDING not in weights or weights[EMBEDDING].shape[0] != len(symbols):
        rows = list(weights[EMBEDDING].shape) if EMBEDDING in weights else "none"
        raise CheckpointError(f"from_pretrained: {EMBEDDING} must have {len(symbols)} rows (the symbols), got {rows}")
    vocabulary = Vocabulary(symbols) if tokenizer is None else tokenizer.vocabulary
    if tokenizer is None:
        tokenizer = _tokenizer(path.parent if bpe is None else Path(bpe), vocabulary)
    config, absent = config_from_ofasys(next(iter(models.values())), len(vocabulary), compat, keys=weights)
    notes = [f"adaptors that do not exist here: {', '.join(absent)}"] if absent else []

    def load(network: OFAPlus) -> Ledger:
        ledger = Ledger(weights, str(path))
        fresh = network.state_dict()[EMBEDDING]
        rows = match_rows(weights[EMBEDDING], symbols, fresh, vocabulary.symbols, notes)
        load_ofasys_weights(network, ledger, absent, {EMBEDDING: rows})
        return ledger

    tasks = {}
    preprocess: dict[str, Any] = {}
    for name, task in (data["configstore"].get("task") or {}).items():
        template = (task.get("instruction") or {}).get("template")
        if template:
            tasks[name] = template
        image = (task.get("preprocess") or {}).get("image") or {}
        if image.get("is_active"):
            preprocess["image_size"] = int(image["patch_image_size"])
        box = (task.get("preprocess") or {}).get("box") or {}
        if box.get("is_active"):
            preprocess["box_image_size"] = int(box["max_image_size"])
    return Foreign(config, tokenizer, load, tasks, preprocess, notes)


def _symbols(path: Path, indices: Mapping[str, int]) -> list[str]:
    ordered = sorted(indices, key=lambda symbol: indices[symbol])
    if [indices[symbol] for symbol in ordered] != list(range(len(ordered))):
        raise CheckpointError(
            f"from_pretrained: the dictionary of {path} must number its symbols 0, 1, 2, ..., got gaps"
        )
    return ordered


def _tokenizer(folder: Path, vocabulary: Vocabulary) -> Tokenizer:
    files = [folder / name for name in _BPE_FILES]
    if not all(file.is_file() for file in files):
        raise CheckpointError(
            f"from_pretrained: {folder} must hold {' and '.join(_BPE_FILES)} (GPT-2's files), got none"
            "\nTry: bpe=FOLDER, or --bpe FOLDER"
        )
    try:
        return Tokenizer.from_files(*files, vocabulary=vocabulary)
    except OfakernValueError as error:
        raise CheckpointError(f"from_pretrained: the BPE in {folder} must be the checkpoint's, got: {error}") from error

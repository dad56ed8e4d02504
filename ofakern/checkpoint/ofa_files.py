"""Files of OFA: folders in its Hugging Face format, read and written, and its fairseq checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ofakern.checkpoint.files import read_json, write_folder, write_json
from ofakern.checkpoint.ledger import Ledger
from ofakern.checkpoint.ofa_hf import (
    config_from_fairseq,
    config_from_hf,
    config_to_hf,
    fairseq_to_hf,
    load_hf_weights,
    to_hf_weights,
)
from ofakern.checkpoint.ofasys import EMBEDDING
from ofakern.checkpoint.parts import Foreign, match_rows
from ofakern.checkpoint.pickles import read_pickle, tensors_of
from ofakern.errors import CheckpointError, OfakernError
from ofakern.model import OFAConfig, OFAPlus
from ofakern.text import Tokenizer, Vocabulary

__all__ = ["is_hf_folder", "read_fairseq", "read_hf_folder", "write_hf_folder"]

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TOKENS = "encoder.embed_tokens.weight"
_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# Boxes are counted in 512ths of the image, whatever its size in pixels.
_PREPROCESS = {"box_image_size": 512}
_CODES, _BINS = 8192, 1000


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder's configuration says that it is OFA's."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") == "ofa"


def read_hf_folder(folder: Path, bpe: str | Path | None, tokenizer: Tokenizer | None, compat: str = "") -> Foreign:
    """config.json, vocab.json, merges.txt and model.safetensors or pytorch_model.bin."""
    config = config_from_hf(read_json(folder / "config.json"), compat)
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"from_pretrained: {folder} must hold {' or '.join(_WEIGHTS)}, got neither")
    weights = _safetensors(path) if path.suffix == ".safetensors" else tensors_of(read_pickle(path), str(path))
    files = folder if bpe is None else Path(bpe)
    held = _hf_tokenizer(files, config.vocab_size) if tokenizer is None or (files / "vocab.json").is_file() else None
    return _foreign(config, weights, str(path), held, tokenizer)


def read_fairseq(path: Path, data: Mapping[str, Any], bpe: str | Path | None, tokenizer: Tokenizer | None) -> Foreign:
    """A checkpoint of OFA's fairseq trainer: weights, and its arguments as a Namespace or in its configuration."""
    weights = tensors_of(data["model"], str(path))
    if _TOKENS not in weights:
        raise CheckpointError(f"from_pretrained: {path} must hold {_TOKENS}, got none")
    arguments = data.get("args") or data["cfg"].get("model")
    known = vars(arguments) if hasattr(arguments, "__dict__") else arguments
    if not isinstance(known, Mapping):
        raise CheckpointError(f"from_pretrained: {path} must hold its arguments, got {type(arguments).__name__}")
    rows = weights[_TOKENS].shape[0]
    config = config_from_fairseq(known, rows)
    files = path.parent if bpe is None else Path(bpe)
    held = _fairseq_tokenizer(files, rows) if tokenizer is None or (files / "dict.txt").is_file() else None
    renamed = {fairseq_to_hf(key): value for key, value in weights.items()}
    return _foreign(config, renamed, str(path), held, tokenizer)


def _foreign(
    config: OFAConfig, weights: Mapping[str, Tensor], where: str, held: Tokenizer | None, given: Tokenizer | None
) -> Foreign:
    """held: the checkpoint's own tokenizer, where its files are there; given: the one to use instead."""
    tokenizer = given or held
    assert tokenizer is not None
    own, wanted = (held or tokenizer).vocabulary, tokenizer.vocabulary
    if _TOKENS not in weights or weights[_TOKENS].shape[0] != len(own):
        rows = list(weights[_TOKENS].shape) if _TOKENS in weights else "none"
        raise CheckpointError(f"{where}: {_TOKENS} must have {len(own)} rows (the vocabulary), got {rows}")
    notes: list[str] = []

    def load(network: OFAPlus) -> Ledger:
        ledger = Ledger(weights, where)
        fresh = network.state_dict()[EMBEDDING]
        rows = match_rows(weights[_TOKENS], own.symbols, fresh, wanted.symbols, notes)
        load_hf_weights(network, ledger, {EMBEDDING: rows})
        return ledger

    return Foreign(config, tokenizer, load, preprocess=dict(_PREPROCESS), notes=notes)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"from_pretrained: {path} must be a whole safetensors file, got: {error}") from error


def _hf_tokenizer(folder: Path, size: int) -> Tokenizer:
    """vocab.json numbers text tokens and specials; codes and bins follow, by name or by OFA's fixed counts."""
    ids = dict(read_json(folder / "vocab.json"))
    if (folder / "added_tokens.json").is_file():
        ids |= read_json(folder / "added_tokens.json")
    symbols: dict[int, str] = {}
    text: dict[str, int] = {}
    for token, index in ids.items():
        kind, _, number = token[1:-1].partition("_") if token.startswith("<") and token.endswith(">") else ("", "", "")
        if token in _SPECIALS:
            symbols[index] = token
        elif kind in ("code", "bin") and number.isdigit():
            symbols[index] = f"<{kind}>_{number}"
        else:
            symbols[index], text[token] = f"<text>_{index}", index
    if size == len(symbols) + _CODES + _BINS:
        named = [*(f"<code>_{i}" for i in range(_CODES)), *(f"<bin>_{i}" for i in range(_BINS))]
        symbols |= dict(enumerate(named, len(symbols)))
    if set(symbols) != set(range(size)):
        raise CheckpointError(
            f"from_pretrained: {folder / 'vocab.json'} must number {size} tokens (or all but {_CODES} codes "
            f"and {_BINS} bins), got {len(symbols)}"
        )
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [(a, b) for a, _, b in (line.partition(" ") for line in lines) if b and a != "#version:"]
        return Tokenizer.from_bpe(text, merges, Vocabulary([symbols[i] for i in range(size)]))
    except (OSError, OfakernError) as error:
        raise CheckpointError(f"from_pretrained: {folder} must hold a whole tokenizer, got: {error}") from error


def _fairseq_tokenizer(folder: Path, rows: int) -> Tokenizer:
    names = ("encoder.json", "vocab.bpe", "dict.txt")
    files = [folder / name for name in names]
    if not all(file.is_file() for file in files):
        raise CheckpointError(
            f"from_pretrained: {folder} must hold {', '.join(names)} (OFA's utils/BPE), got not all of them"
            "\nTry: bpe=FOLDER, or --bpe FOLDER"
        )
    tokenizer = Tokenizer.from_files(*files, codes=_CODES, bins=_BINS)
    if len(tokenizer.vocabulary) != rows:
        raise CheckpointError(
            f"from_pretrained: the vocabulary of {folder} must have the checkpoint's {rows} rows, "
            f"got {len(tokenizer.vocabulary)}"
        )
    return tokenizer


def write_hf_folder(directory: Path, network: OFAPlus, tokenizer: Tokenizer) -> None:
    """A folder that OFA's port reads. Raises CheckpointError for a model that its format cannot hold."""
    data = config_to_hf(network.config)
    weights = {key: value.contiguous() for key, value in to_hf_weights(network).items()}
    vocabulary = tokenizer.vocabulary
    bpe = json.loads(tokenizer.bpe.to_str())["model"]
    ids = {token: vocabulary.index(token) for token in _SPECIALS}
    ids |= {token: vocabulary.index(f"<text>_{number}") for token, number in bpe["vocab"].items()}
    added = {}
    for kind in ("code", "bin"):
        for index in vocabulary.range(kind):
            added[f"<{kind}_{vocabulary.symbol(index).rpartition('_')[2]}>"] = index
    merges = [line if isinstance(line, str) else " ".join(line) for line in bpe["merges"]]

    def write(folder: Path) -> None:
        write_json(folder / "config.json", data)
        write_json(folder / "vocab.json", dict(sorted(ids.items(), key=lambda item: item[1])))
        write_json(folder / "added_tokens.json", added)
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        torch.save(weights, folder / "pytorch_model.bin")

    write_folder(directory, write)

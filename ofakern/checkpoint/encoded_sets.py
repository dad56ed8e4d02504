"""The tokens of a saved model's large closed sets: encoding a million answers takes half a minute, reading them none.

A file of tensors beside plans.json. It says of each set what it was made from (answers, tokenizer, plans); a set that
does not fit any more is left out and encoded again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ofakern.checkpoint.known_task import KnownTask
from ofakern.errors import CheckpointError
from ofakern.text import Tokenizer
from ofakern.text.trie import TokenSequences

__all__ = ["ENCODED_SETS", "LEAST", "save_encoded_sets", "with_encoded_sets"]

ENCODED_SETS = "closed_sets.safetensors"
LEAST = 10_000  # answers; fewer are encoded in no time


def save_encoded_sets(folder: Path, tasks: Mapping[str, KnownTask], tokenizer: Tokenizer) -> None:
    """Write the file for the tasks' large closed sets, if there are any."""
    tensors, made_of = {}, {}
    for task, known in tasks.items():
        for slot in _large(known):
            sequences = known.closed_sets(tokenizer)[slot].sequences
            tensors[f"{task}/{slot}/tokens"] = torch.from_numpy(sequences.tokens)
            tensors[f"{task}/{slot}/offsets"] = torch.from_numpy(sequences.offsets)
            made_of[f"{task}/{slot}"] = _made_of(known, slot, tokenizer)
    if tensors:
        save_file(tensors, folder / ENCODED_SETS, made_of)


def with_encoded_sets(folder: Path, tasks: Mapping[str, KnownTask], tokenizer: Tokenizer) -> dict[str, KnownTask]:
    """The tasks with the tokens that the file has of their sets. Raises CheckpointError for a damaged file."""
    path = folder / ENCODED_SETS
    if not path.is_file():
        return dict(tasks)
    found = {}
    try:
        with safe_open(path, "np") as file:
            made_of = file.metadata() or {}
            for task, known in tasks.items():
                slots = [s for s in _large(known) if made_of.get(f"{task}/{s}") == _made_of(known, s, tokenizer)]
                read = {
                    s: tuple(file.get_tensor(f"{task}/{s}/{part}") for part in ("tokens", "offsets")) for s in slots
                }
                found[task] = dataclasses.replace(known, encoded={s: _checked(path, *read[s]) for s in slots})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"from_pretrained: {path} must hold closed sets, got: {error}") from error
    return found


def _large(known: KnownTask) -> list[str]:
    return [slot for slot, answers in known.answers.items() if len(answers) >= LEAST]


def _made_of(known: KnownTask, slot: str, tokenizer: Tokenizer) -> str:
    """What tokens follow from: the slot's attributes stand in the plans."""
    digest = hashlib.sha256(tokenizer.bpe.to_str().encode())
    digest.update(json.dumps([plan.to_dict() for plan in known.plans], sort_keys=True).encode())
    digest.update(json.dumps([len(tokenizer.vocabulary), tokenizer.vocabulary.range("text").start]).encode())
    digest.update("\n".join(known.answers[slot]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _checked(path: Path, tokens: np.ndarray, offsets: np.ndarray) -> TokenSequences:
    plain = tokens.dtype == np.int32 and offsets.dtype == np.int64 and tokens.ndim == offsets.ndim == 1
    if not plain or not len(offsets) or offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 0).any():
        raise CheckpointError(f"from_pretrained: {path} must hold whole token sequences, got others")
    return TokenSequences(tokens, offsets)

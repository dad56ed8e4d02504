"""A run's checkpoints: folders that are whole or not there, each a model that `from_pretrained` loads.

checkpoint-00000100/
    (what the model's save_pretrained writes)      the weights to use: averaged ones where an average is kept
    training.safetensors                           optimizer state, and the raw weights beside averaged ones
    trainer_state.json                             update, positions in the data, broken samples
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ofakern.checkpoint.files import replace_folder
from ofakern.errors import CheckpointError

_NAME = re.compile(r"checkpoint-(\d{8})")
_STATE = "trainer_state.json"
_TENSORS = "training.safetensors"


class Saveable(Protocol):
    """What a checkpoint needs of a model."""

    def save_pretrained(self, directory: str | Path) -> None: ...


def save_checkpoint(
    folder: Path, model: Saveable, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep_last: int
) -> Path:
    """Write the checkpoint of update `state["update"]` and drop the oldest beyond `keep_last` (0: none).

    It is written under a temporary name and renamed, so a reader never meets half of one.
    """
    final = folder / f"checkpoint-{state['update']:08d}"
    partial = folder / f".{final.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / _TENSORS)
    (partial / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    replace_folder(partial, final)
    if keep_last:
        for old in list_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    return final


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = Path(folder).glob("checkpoint-*")
    return sorted(path for path in found if _NAME.fullmatch(path.name) and (path / _STATE).is_file())


def latest_checkpoint(folder: str | Path) -> Path:
    """The newest checkpoint of a run; CheckpointError when there is none."""
    found = list_checkpoints(folder)
    if not found:
        raise CheckpointError(f"resume: output_dir must hold a checkpoint, got none in {str(folder)!r}")
    return found[-1]


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The training tensors and the state of a checkpoint; CheckpointError when either is damaged."""
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        return load_file(path / _TENSORS), state
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"resume: {str(path)!r} must be a whole checkpoint, got: {error}") from error

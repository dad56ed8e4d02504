"""torch.save files of other systems: read as data only, with an explicit list of what may be in them."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ofakern.errors import CheckpointError

__all__ = ["ALLOWED", "read_pickle", "tensors_of"]

# Beyond tensors and plain data: what fairseq's and OFASys's trainers write. A Namespace only holds attributes.
ALLOWED: tuple[type, ...] = (argparse.Namespace,)


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary of a torch.save file, on the CPU.

    Raises CheckpointError for a damaged file, one that is no dictionary, and one with any other class or function in
    it, all of which are named; none of them is called.
    """
    with safe_globals(list(ALLOWED)):
        try:
            refused = get_unsafe_globals_in_checkpoint(path)
        except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError, OSError):
            refused = []  # an older format, or damaged: loading decides
        if refused:
            raise CheckpointError(
                f"from_pretrained: {path} must hold tensors and plain data only, got {', '.join(sorted(refused))}"
            )
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"from_pretrained: {path} must hold tensors and plain data only, got: {_first_line(error)}"
            ) from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"from_pretrained: {path} must be a whole torch.save file, got: {_first_line(error)}"
            ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"from_pretrained: {path} must hold a dictionary, got {type(data).__name__}")
    return data


def tensors_of(data: Any, where: str) -> Mapping[str, Tensor]:
    """A state dict. CheckpointError when it is anything but tensors by name."""
    if not isinstance(data, Mapping):
        raise CheckpointError(f"from_pretrained: {where} must hold tensors by name, got {type(data).__name__}")
    wrong = next(
        (key for key, value in data.items() if not isinstance(key, str) or not isinstance(value, Tensor)), None
    )
    if wrong is not None:
        raise CheckpointError(
            f"from_pretrained: {where} must hold tensors by name, got {type(data[wrong]).__name__} for {wrong!r}"
        )
    return data


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    unsupported = next((line for line in text.splitlines() if "GLOBAL" in line), None)
    return unsupported or (text.splitlines()[0] if text else type(error).__name__)

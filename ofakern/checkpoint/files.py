"""Files of a saved model: written whole or not at all, read with errors that name what is wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ofakern.errors import CheckpointError

__all__ = ["load_module", "read_json", "replace_folder", "save_module", "write_folder", "write_json"]

_SHOWN = 5


def write_folder(directory: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write(folder)` with a temporary folder beside `directory`, then put its files in place.

    A new directory appears at once, whole. In one that is there already every file is replaced at once, and files that
    are not ours stay.
    """
    final = Path(directory)
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        if final.exists():
            for file in sorted(partial.iterdir()):
                os.replace(file, final / file.name)
        else:
            partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(partial: Path, final: Path) -> None:
    """Put `partial` in the place of `final`; what stood there is removed only after the new one is in place."""
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Plain data as JSON."""
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError when the file is missing or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"from_pretrained: {path} must be there, got: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"from_pretrained: {path} must be JSON, got: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"from_pretrained: {path} must hold an object, got {type(data).__name__}")
    return data


def save_module(path: Path, module: nn.Module, tied: Mapping[str, str]) -> None:
    """The module's tensors as safetensors; `tied` maps names that are left out to the name of the same tensor."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items() if k not in tied}
    save_file(tensors, path, metadata={"format": "pt"})


def load_module(path: Path, module: nn.Module, tied: Mapping[str, str]) -> None:
    """Load what `save_module` wrote. CheckpointError names missing, unexpected and misshapen keys."""
    if not path.is_file():
        raise CheckpointError(f"from_pretrained: {path} must be there, got no such file")
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"from_pretrained: {path} must be a whole safetensors file, got: {error}") from error
    own = {name: tensor for name, tensor in module.state_dict().items() if name not in tied}
    _check_names(path, own, stored)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])


def _check_names(path: Path, own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    problems = []
    for what, names in (("missing", own.keys() - stored.keys()), ("unexpected", stored.keys() - own.keys())):
        if names:
            problems.append(f"{len(names)} {what}: {_listed(names)}")
    misshapen = {n for n in own.keys() & stored.keys() if own[n].shape != stored[n].shape}
    if misshapen:
        shown = {f"{n} {list(stored[n].shape)} instead of {list(own[n].shape)}" for n in misshapen}
        problems.append(f"{len(misshapen)} of another shape: {_listed(shown)}")
    if problems:
        raise CheckpointError(f"from_pretrained: keys of {path} must be the model's, got {'; '.join(problems)}")


def _listed(names: set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:_SHOWN]) + (" ..." if len(ordered) > _SHOWN else "")

"""Reads a directory of recorded cases of the OFASys implementation: config, weights, inputs.

Layout: `config.json` ({"model": ...}), `state_dict*.safetensors`, `state_dict_manifest.json` (every key of the
reference with shape and kind; tensors of kind `formula_backbone` are computed from the seed, offset and std it
records), `index.json`, and per case `<case>.json` and `<case>.npz`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ofakern.checkpoint.ledger import Ledger
from ofakern.checkpoint.ofasys import EMBEDDING, config_from_ofasys, load_ofasys_weights
from ofakern.errors import CheckpointError, DataError
from ofakern.model import OFAPlus


def load_model(directory: Path, backend: str = "auto") -> tuple[OFAPlus, list[str]]:
    """The model of a directory in eval mode with its weights, and the adaptors it lacks. Raises CheckpointError."""
    model_options = read_json(directory / "config.json")["model"]
    manifest: dict[str, dict[str, Any]] = read_json(directory / "state_dict_manifest.json")
    weights = read_weights(directory, manifest)
    embed = weights.get(EMBEDDING)
    if embed is None:
        raise CheckpointError(f"{directory}: state dict must contain {EMBEDDING}, got none")
    config, missing = config_from_ofasys(model_options, embed.shape[0])
    model = OFAPlus(config, backend=backend).eval()
    load_ofasys_weights(model, Ledger(weights, str(directory)), missing)
    return model, missing


def read_weights(directory: Path, manifest: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """All stored tensors, and the computed ones of kind `formula_backbone`."""
    files = sorted(directory.glob("state_dict*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: state dict must be in state_dict*.safetensors, got no such file")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights.update(load_file(file))
    for key, entry in manifest.items():
        if entry["kind"] == "formula_backbone" and key not in weights:
            weights[key] = formula_tensor(entry["shape"], entry["crc32_seed"], entry["offset"], entry["std"])
    return weights


def formula_tensor(shape: list[int], seed: int, offset: float, std: float) -> Tensor:
    """f32: offset + std * sqrt(12) * u with u in [-0.5, 0.5) from an integer hash of (element number + seed)."""
    mask = np.uint64(0xFFFFFFFF)
    count = int(np.prod(shape)) if shape else 1
    x = (np.arange(count, dtype=np.uint64) + np.uint64(seed)) & mask
    for factor, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13), (0xC2B2AE3D, 16)):
        x = (x * np.uint64(factor)) & mask
        x ^= x >> np.uint64(shift)
    uniform = x.astype(np.float64) / 4294967296.0 - 0.5
    values = offset + std * np.sqrt(12.0) * uniform
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def read_json(path: Path) -> dict[str, Any]:
    """Raises DataError when the file is absent or no JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: file must be a readable JSON object, got {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: file must be a JSON object, got {type(data).__name__}")
    return data

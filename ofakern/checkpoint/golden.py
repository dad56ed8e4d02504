"""Reads a directory of recorded cases of the OFASys implementation: config, weights, inputs.

Layout: `config.json` ({"model": ...}), `state_dict*.safetensors`, `state_dict_manifest.json` (every key of the
reference with shape and kind; tensors of kind `formula_backbone` are computed from the seed, offset and std it
records), `index.json`, and per case `<case>.json` and `<case>.npz`.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ofakern.errors import CheckpointError, DataError
from ofakern.modality.image.adaptor import ImagePatchEmbedConfig, ImageResnetConfig, ImageVitConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import TIED_KEYS, OFAConfig, OFAPlus
from ofakern.nn.adaptor import AdaptorConfig

PAD = 1

# Adaptor option names of OFASys -> ours, per adaptor.
_OPTIONS: dict[str, tuple[type[AdaptorConfig], dict[str, str]]] = {
    "text": (TextAdaptorConfig, {"max_position": "max_position", "token_bucket_size": "bucket_size"}),
    "image_resnet": (
        ImageResnetConfig,
        {
            "resnet_type": "resnet_type",
            "image_bucket_size": "bucket_size",
            "resnet_drop_path_rate": "drop_path",
            "freeze_resnet": "freeze_batch_norm",
        },
    ),
    "image_vit": (
        ImageVitConfig,
        {"vit_type": "vit_type", "image_bucket_size": "bucket_size", "vit_drop_path_rate": "drop_path"},
    ),
    "image_patch_embed": (
        ImagePatchEmbedConfig,
        {
            "image_size_height": "image_height",
            "image_size_width": "image_width",
            "patch_size_height": "patch_height",
            "patch_size_width": "patch_width",
            "add_cls_token": "class_token",
        },
    ),
}
_SAME_NAME = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "attn_scale_factor",
    "scale_attn",
    "scale_fc",
    "scale_heads",
    "scale_resids",
    "use_self_attn_bias",
    "share_attn_bias",
    "entangle_position_embedding",
)


def config_from_ofasys(model: dict[str, Any], vocab_size: int) -> tuple[OFAConfig, list[str]]:
    """The configuration of an OFASys model dictionary, and the names of active adaptors that do not exist here."""
    encoder, decoder = model["encoder"], model["decoder"]
    for name in ("embed_dim", "ffn_embed_dim", "attention_heads", "normalize_before"):
        if encoder[name] != decoder[name]:
            raise CheckpointError(f"OFASys config: {name} must agree, got {encoder[name]} and {decoder[name]}")
    if model.get("modal_ffn"):
        raise CheckpointError("OFASys config: modal_ffn must be off, got True")
    active = {n: o for n, o in model["adaptor"].items() if isinstance(o, dict) and o.get("is_active")}
    config = OFAConfig(
        vocab_size=vocab_size,
        pad_id=PAD,
        dim=encoder["embed_dim"],
        ffn_dim=encoder["ffn_embed_dim"],
        heads=encoder["attention_heads"],
        encoder_layers=encoder["layers"],
        decoder_layers=decoder["layers"],
        activation=model["activation_fn"],
        normalize_before=encoder["normalize_before"],
        encoder_drop_path=model["encode_drop_path_rate"],
        decoder_drop_path=model["decode_drop_path_rate"],
        adaptors=tuple(_adaptor(name, options) for name, options in active.items() if name in _OPTIONS),
        compat="ofasys",
        **{name: model[name] for name in _SAME_NAME},
    )
    return config, sorted(set(active) - set(_OPTIONS))


def load_model(directory: Path, backend: str = "auto") -> tuple[OFAPlus, list[str]]:
    """The model of a directory in eval mode with its weights, and the adaptors it lacks. Raises CheckpointError."""
    model_options = read_json(directory / "config.json")["model"]
    manifest: dict[str, dict[str, Any]] = read_json(directory / "state_dict_manifest.json")
    weights = read_weights(directory, manifest)
    embed = weights.get("encoder.adaptor.embed_tokens.weight")
    if embed is None:
        raise CheckpointError(f"{directory}: state dict must contain encoder.adaptor.embed_tokens.weight, got none")
    config, missing = config_from_ofasys(model_options, embed.shape[0])
    model = OFAPlus(config, backend=backend).eval()
    load_weights(model, weights, manifest, missing)
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


def load_weights(
    model: OFAPlus, weights: dict[str, Tensor], manifest: dict[str, dict[str, Any]], missing_adaptors: list[str]
) -> None:
    """Loads what the model has. Raises CheckpointError for absent keys and for keys that nothing accounts for."""
    own = model.state_dict()
    derived = {key for key, entry in manifest.items() if entry["kind"] == "derived_buffer"}
    skipped = tuple(f"{side}.adaptor.{name}." for side in ("encoder", "decoder") for name in missing_adaptors)
    needed = {key for key in own if key not in TIED_KEYS and not key.endswith("num_batches_tracked")}
    absent = sorted(needed - set(weights))
    if absent:
        raise CheckpointError(f"state dict: keys must all be there, got {len(absent)} missing, e.g. {absent[:3]}")
    extra = [k for k in weights if k not in own and k not in derived and not k.startswith(skipped)]
    if extra:
        raise CheckpointError(f"state dict: keys must all be known, got {len(extra)} unknown, e.g. {sorted(extra)[:3]}")
    for key in needed:
        if weights[key].shape != own[key].shape:
            raise CheckpointError(
                f"state dict: {key} must have shape {list(own[key].shape)}, got {list(weights[key].shape)}"
            )
    model.load_state_dict({key: weights[key] for key in needed}, strict=False)


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


def _adaptor(name: str, options: dict[str, Any]) -> AdaptorConfig:
    kind, renamed = _OPTIONS[name]
    values = {ours: options[theirs] for theirs, ours in renamed.items()}
    shared = {f.name for f in fields(AdaptorConfig)} - {"scale_embedding"}
    values.update({field: options[field] for field in shared})
    return kind(**values, scale_embedding=not options["no_scale_embedding"])

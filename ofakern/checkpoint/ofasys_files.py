"""Writing a model as OFASys's trainer stores it: weights, configuration store, dictionary."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ofakern.checkpoint.ofasys import ADAPTOR_OPTIONS, SAME_NAME
from ofakern.errors import CheckpointError
from ofakern.modality.image.adaptor import ImageResnetConfig
from ofakern.modality.image.codes import ImageCodesConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import OFAConfig, OFAPlus
from ofakern.nn.adaptor import AdaptorConfig
from ofakern.text import Vocabulary

__all__ = ["config_to_ofasys", "write_ofasys_file"]

_CODE_PIXELS = 8
# Of a loss: OFASys has them in its tasks' configuration, not in the model's.
_OF_A_LOSS = {"stop_weight", "guided_attention", "guided_attention_sigma"}
# Options beyond OFASys: a model that uses one cannot be written.
_BEYOND = ("max_segments", "target_slots", "adapter_dim", "encoder_prefix", "decoder_prefix", "entangle_decoder")


def config_to_ofasys(config: OFAConfig) -> dict[str, Any]:
    """The model dictionary of OFASys. Raises CheckpointError for a model that it cannot describe."""
    used = [name for name in _BEYOND if getattr(config, name)]
    if used:
        raise CheckpointError(f"OFASys format: options beyond OFASys must be off, got {', '.join(used)}")
    side = {
        "embed_dim": config.dim,
        "ffn_embed_dim": config.ffn_dim,
        "attention_heads": config.heads,
        "normalize_before": config.normalize_before,
    }
    return {
        "_name": "unify",
        "arch": "",
        "activation_fn": config.activation,
        "encoder": {**side, "layers": config.encoder_layers},
        "decoder": {**side, "layers": config.decoder_layers},
        "encode_drop_path_rate": config.encoder_drop_path,
        "decode_drop_path_rate": config.decoder_drop_path,
        "adaptor": {adaptor.name: _adaptor(adaptor, config) for adaptor in config.adaptors},
        **{name: getattr(config, name) for name in SAME_NAME},
    }


def _adaptor(adaptor: AdaptorConfig, config: OFAConfig) -> dict[str, Any]:
    kind, renamed = ADAPTOR_OPTIONS[adaptor.name]
    written = {*renamed.values(), *(field.name for field in fields(AdaptorConfig)), "window"} | _OF_A_LOSS
    if isinstance(adaptor, TextAdaptorConfig) and adaptor.bucket_range in (None, adaptor.max_position):
        written.add("bucket_range")
    if isinstance(adaptor, ImageResnetConfig) and adaptor.resnet_width == 64:
        written.add("resnet_width")
    fresh = kind()
    lost = [f.name for f in fields(adaptor) if f.name not in written]
    lost = [name for name in lost if getattr(adaptor, name) != getattr(fresh, name)]
    if lost:
        raise CheckpointError(
            f"OFASys format: {adaptor.name} must have no options beyond OFASys, got {', '.join(lost)}"
        )
    shared = {f.name: getattr(adaptor, f.name) for f in fields(AdaptorConfig) if f.name != "scale_embedding"}
    entangle = adaptor.entangle_position_embedding
    shared["entangle_position_embedding"] = config.entangle_position_embedding if entangle is None else entangle
    options = {theirs: getattr(adaptor, ours) for theirs, ours in renamed.items()}
    if isinstance(adaptor, ImageCodesConfig):
        options |= {"code_image_size": adaptor.window * _CODE_PIXELS, "vqgan_factor": _CODE_PIXELS}
    return {"is_active": True, **shared, **options, "no_scale_embedding": not adaptor.scale_embedding}


def write_ofasys_file(path: Path, network: OFAPlus, vocabulary: Vocabulary, tasks: Mapping[str, str]) -> None:
    """tasks: instruction by name. The file appears whole or not at all.

    Raises CheckpointError for a model that OFASys cannot hold. Its integer buffers are left out: OFASys computes them.
    """
    store = {
        "model": {"unify": config_to_ofasys(network.config)},
        "task": {name: {"_name": name, "instruction": {"template": text}} for name, text in tasks.items()},
    }
    data: dict[str, Any] = {
        "args": None,
        "cfg": {},
        "configstore": store,
        "model": {key: value.detach().cpu().clone() for key, value in network.state_dict().items()},
        "optimizer_history": [],
        "extra_state": {},
        "global_dict_indices": dict(vocabulary.indices),
        "last_optimizer_state": None,
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        torch.save(data, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

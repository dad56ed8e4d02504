"""OFA's Hugging Face format: its configuration and state-dict keys, both ways; fairseq's keys onto them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ofakern.checkpoint.ledger import Ledger
from ofakern.checkpoint.ofasys import EMBEDDING, PAD
from ofakern.errors import CheckpointError
from ofakern.modality.image.adaptor import ImageResnetConfig
from ofakern.modality.image.codes import ImageCodesConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import TIED_KEYS, OFAConfig, OFAPlus

__all__ = [
    "config_from_fairseq",
    "config_from_hf",
    "config_to_hf",
    "fairseq_changes",
    "fairseq_to_hf",
    "hf_key",
    "load_hf_weights",
    "to_hf_weights",
]

# OFA's token buckets always span this many positions.
BUCKET_RANGE = 1024
# Pixels per code of the published VQGAN.
CODE_PIXELS = 8
# Types without a backbone of their own name: all are bottleneck blocks there.
_BLOCKS = {"resnet18": (2, 2, 2), "resnet34": (3, 4, 6)}
_TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")
_DERIVED = re.compile(r"(_rp_bucket|image_position_idx|\.version)$")
_TYPES = "encoder.type_embedding.weight"

# Their prefix -> ours; the first that fits is taken.
_PREFIXES = (
    ("encoder.layernorm_embedding.", "encoder.adaptor.text.layernorm_embedding."),
    ("encoder.patch_layernorm_embedding.", "encoder.adaptor.image_resnet.layernorm_embedding."),
    ("encoder.embed_images.", "encoder.adaptor.image_resnet.embed_images."),
    ("encoder.image_proj.", "encoder.adaptor.image_resnet.image_proj."),
    ("encoder.embed_positions.", "encoder.adaptor.text.embed_positions."),
    ("encoder.embed_image_positions.", "encoder.adaptor.image_resnet.embed_image_positions."),
    ("encoder.pos_ln.", "encoder.adaptor.text.layernorm_position."),
    ("encoder.image_pos_ln.", "encoder.adaptor.image_resnet.layernorm_position."),
    ("encoder.pos_q_linear.", "encoder.adaptor.pos_q_linear."),
    ("encoder.pos_k_linear.", "encoder.adaptor.pos_k_linear."),
    ("encoder.token_rel_pos_table_list.", "encoder.adaptor.text.token_rel_pos_table_list."),
    ("encoder.image_rel_pos_table_list.", "encoder.adaptor.image_resnet.image_rel_pos_table_list."),
    ("decoder.layernorm_embedding.", "decoder.adaptor.text.layernorm_embedding."),
    ("decoder.code_layernorm_embedding.", "decoder.adaptor.image_vqgan.layernorm_embedding."),
    ("decoder.embed_positions.", "decoder.adaptor.text.embed_positions."),
    ("decoder.embed_image_positions.", "decoder.adaptor.image_vqgan.embed_code_positions."),
    ("decoder.pos_ln.", "decoder.adaptor.text.layernorm_position."),
    ("decoder.image_pos_ln.", "decoder.adaptor.image_vqgan.layernorm_position."),
    ("decoder.self_pos_q_linear.", "decoder.adaptor.pos_q_linear."),
    ("decoder.self_pos_k_linear.", "decoder.adaptor.pos_k_linear."),
    ("decoder.token_rel_pos_table_list.", "decoder.adaptor.text.token_rel_pos_table_list."),
    ("decoder.image_rel_pos_table_list.", "decoder.adaptor.image_vqgan.code_rel_pos_table_list."),
)
# Inside a layer: fairseq's and our name -> the port's, by side.
_LAYER_NAMES = {
    "encoder": {"attn_ln": "self_attn_mid_layer_norm", "ffn_layernorm": "ffn_layer_norm"},
    "decoder": {
        "self_attn_ln": "self_attn_mid_layer_norm",
        "cross_attn_ln": "cross_attn_mid_layer_norm",
        "encoder_attn": "cross_attn",
        "encoder_attn_layer_norm": "cross_attn_layer_norm",
        "ffn_layernorm": "ffn_layer_norm",
    },
}
_LAYER = re.compile(r"^(encoder|decoder)\.layers\.(\d+)\.([^.]+)(.*)$")


def config_from_hf(data: Mapping[str, Any], compat: str = "") -> OFAConfig:
    """The configuration of an OFAConfig dictionary. Raises CheckpointError for what this model cannot express."""
    where = "OFA config"
    try:
        for name in ("attention_heads", "ffn_dim", "normalize_before"):
            ours, theirs = data[f"encoder_{name}"], data[f"decoder_{name}"]
            if ours != theirs:
                raise CheckpointError(f"{where}: {name} must agree, got {ours} and {theirs}")
        if data.get("entangle_position_embedding"):
            raise CheckpointError(f"{where}: entangle_position_embedding must be off, got True")
        for name in ("encoder_layerdrop", "decoder_layerdrop"):
            if data.get(name):
                raise CheckpointError(f"{where}: {name} must be 0, got {data[name]}")
        kind = data["resnet_type"]
        norms = {"layernorm_embedding": data["layernorm_embedding"], "scale_embedding": data["scale_embedding"]}
        types = data["add_type_embedding"]
        normformer = data["normformer"]
        return OFAConfig(
            vocab_size=data["vocab_size"],
            pad_id=data["pad_token_id"],
            dim=data["d_model"],
            ffn_dim=data["encoder_ffn_dim"],
            heads=data["encoder_attention_heads"],
            encoder_layers=data["encoder_layers"],
            decoder_layers=data["decoder_layers"],
            activation=data["activation_function"],
            normalize_before=data["encoder_normalize_before"],
            dropout=data["dropout"],
            attention_dropout=data["attention_dropout"],
            activation_dropout=data["activation_dropout"],
            encoder_drop_path=data["encoder_drop_path_rate"],
            decoder_drop_path=data["decoder_drop_path_rate"],
            attn_scale_factor=data["attn_scale_factor"],
            scale_attn=normformer,
            scale_fc=normformer,
            scale_heads=normformer,
            adaptors=(
                TextAdaptorConfig(
                    max_position=data["max_position_embeddings"],
                    bucket_size=data["token_bucket_size"],
                    bucket_range=BUCKET_RANGE,
                    add_type_embedding=types,
                    **norms,
                ),
                ImageResnetConfig(
                    resnet_type="resnet50" if kind in _BLOCKS else kind,
                    resnet_blocks=_BLOCKS.get(kind),
                    bucket_size=data["image_bucket_size"],
                    drop_path=data["resnet_drop_path_rate"],
                    layernorm_embedding=data["patch_layernorm_embedding"],
                    add_type_embedding=types,
                ),
                ImageCodesConfig(
                    window=data["code_image_size"] // CODE_PIXELS,
                    bucket_size=data["image_bucket_size"],
                    layernorm_embedding=data["code_layernorm_embedding"],
                    scale_embedding=data["scale_embedding"],
                    add_type_embedding=types,
                ),
            ),
            compat=compat,
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: fields must all be there, got none for {error}") from error


def config_to_hf(config: OFAConfig) -> dict[str, Any]:
    """The inverse. Raises CheckpointError for a model that OFA's format cannot hold."""
    text, image, codes = (_part(config, kind) for kind in (TextAdaptorConfig, ImageResnetConfig, ImageCodesConfig))
    assert isinstance(text, TextAdaptorConfig)
    assert isinstance(image, ImageResnetConfig) and isinstance(codes, ImageCodesConfig)
    blocks = {value: key for key, value in _BLOCKS.items()}
    normformer = config.scale_attn
    wrong = {
        "adaptors must be text, image_resnet and image_vqgan": len(config.adaptors) != 3,
        "scale_attn, scale_fc and scale_heads must agree": {config.scale_fc, config.scale_heads} != {normformer},
        "buckets must span 1024 positions": (text.bucket_range or text.max_position) != BUCKET_RANGE,
        "relative bias must be per layer": config.share_attn_bias or not config.use_self_attn_bias,
        "positions must not be entangled": config.entangle_position_embedding,
        "options beyond OFA must be off": bool(
            config.modal_ffn
            or config.max_segments
            or config.target_slots
            or config.scale_resids
            or config.adapter_dim
            or config.encoder_prefix
            or config.decoder_prefix
            or config.entangle_decoder
        ),
        "the backbone must be a published one": image.resnet_width != 64
        or (image.resnet_blocks is not None and image.resnet_blocks not in blocks),
        "image and code buckets must agree": image.bucket_size != codes.bucket_size,
        "image positions must not be interpolated": image.position_grid is not None,
    }
    problems = [rule for rule, broken in wrong.items() if broken]
    if problems:
        raise CheckpointError(f"OFA format: {problems[0]}, got {config}")
    return {
        "model_type": "ofa",
        "architectures": ["OFAModel"],
        "vocab_size": config.vocab_size,
        "pad_token_id": config.pad_id,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": 2,
        "is_encoder_decoder": True,
        "d_model": config.dim,
        "max_position_embeddings": text.max_position,
        "token_bucket_size": text.bucket_size,
        "image_bucket_size": image.bucket_size,
        "code_image_size": codes.window * CODE_PIXELS,
        "activation_function": config.activation,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "attn_scale_factor": config.attn_scale_factor,
        "normformer": normformer,
        "entangle_position_embedding": False,
        "add_type_embedding": text.add_type_embedding,
        "layernorm_embedding": text.layernorm_embedding,
        "patch_layernorm_embedding": image.layernorm_embedding,
        "code_layernorm_embedding": codes.layernorm_embedding,
        "scale_embedding": text.scale_embedding,
        "share_decoder_input_output_embed": True,
        "resnet_type": image.resnet_type if image.resnet_blocks is None else blocks[image.resnet_blocks],
        "resnet_drop_path_rate": image.drop_path,
        **_per_side(config),
    }


def _per_side(config: OFAConfig) -> dict[str, Any]:
    sides = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    rates = {"encoder": config.encoder_drop_path, "decoder": config.decoder_drop_path}
    found: dict[str, Any] = {}
    for side, layers in sides.items():
        found |= {
            f"{side}_layers": layers,
            f"{side}_ffn_dim": config.ffn_dim,
            f"{side}_attention_heads": config.heads,
            f"{side}_normalize_before": config.normalize_before,
            f"{side}_drop_path_rate": rates[side],
            f"{side}_layerdrop": 0.0,
        }
    return found


def _part(config: OFAConfig, kind: type) -> object:
    found = next((adaptor for adaptor in config.adaptors if isinstance(adaptor, kind)), None)
    if found is None:
        names = [adaptor.name for adaptor in config.adaptors]
        raise CheckpointError(f"OFA format: adaptors must be text, image_resnet and image_vqgan, got {names}")
    return found


def fairseq_changes(arguments: Mapping[str, Any], config: OFAConfig) -> dict[str, Any]:
    """Fields of OFAConfig that fairseq's arguments ask for beyond the port's configuration."""
    changes: dict[str, Any] = {}
    if arguments.get("scale_resids"):
        changes["scale_resids"] = True
    if arguments.get("adapter"):
        changes["adapter_dim"] = arguments["adapter_dim"]
    if arguments.get("disable_entangle") is False:
        changes["entangle_decoder"] = True
    widths = set()
    for side in ("encoder", "decoder"):
        if not arguments.get(f"{side}_prompt"):
            continue
        if arguments.get(f"{side}_prompt_type") != "prefix":
            kind = arguments.get(f"{side}_prompt_type")
            raise CheckpointError(f"OFA arguments: {side}_prompt_type must be 'prefix', got {kind!r}")
        changes[f"{side}_prefix"] = arguments[f"{side}_prompt_length"]
        projected = arguments.get(f"{side}_prompt_projection")
        widths.add((arguments.get(f"{side}_prompt_dim") or 2 * config.dim) if projected else 0)
    if len(widths) > 1:
        raise CheckpointError(f"OFA arguments: prompt projections of both sides must agree, got {sorted(widths)}")
    if widths:
        changes["prefix_dim"] = widths.pop()
    if arguments.get("interpolate_position"):
        side_length = arguments["orig_patch_image_size"] // 16
        changes["adaptors"] = tuple(
            replace(a, position_grid=side_length) if isinstance(a, ImageResnetConfig) else a for a in config.adaptors
        )
    return changes


_FAIRSEQ_NAMES = {
    "d_model": "encoder_embed_dim",
    "encoder_ffn_dim": "encoder_ffn_embed_dim",
    "decoder_ffn_dim": "decoder_ffn_embed_dim",
    "max_position_embeddings": "max_source_positions",
    "activation_function": "activation_fn",
    "normformer": "scale_attn",
}
_FAIRSEQ_SAME = (
    *(
        f"{side}_{name}"
        for side in ("encoder", "decoder")
        for name in ("layers", "attention_heads", "normalize_before")
    ),
    *("encoder_drop_path_rate", "decoder_drop_path_rate", "resnet_drop_path_rate", "resnet_type"),
    *("dropout", "attention_dropout", "activation_dropout", "attn_scale_factor"),
    *("token_bucket_size", "image_bucket_size", "code_image_size", "add_type_embedding"),
    *("layernorm_embedding", "patch_layernorm_embedding", "code_layernorm_embedding"),
)


def config_from_fairseq(arguments: Mapping[str, Any], vocab_size: int) -> OFAConfig:
    """The configuration of fairseq's arguments. Raises CheckpointError for what this model cannot express."""
    try:
        data = {name: arguments[name] for name in _FAIRSEQ_SAME}
        data |= {ours: arguments[theirs] for ours, theirs in _FAIRSEQ_NAMES.items()}
        if not arguments["scale_attn"] == arguments["scale_fc"] == arguments["scale_heads"]:
            raise CheckpointError("OFA arguments: scale_attn, scale_fc and scale_heads must agree, got different ones")
        data["scale_embedding"] = not arguments["no_scale_embedding"]
    except KeyError as error:
        raise CheckpointError(f"OFA arguments: they must all be there, got none for {error}") from error
    config = config_from_hf({**data, "vocab_size": vocab_size, "pad_token_id": PAD})
    # The flag's absence has a meaning in fairseq: positions are added to the decoder's embeddings.
    changes = fairseq_changes({"disable_entangle": False, **arguments}, config)
    return replace(config, **changes)


def fairseq_to_hf(key: str) -> str:
    """OFA's fairseq key as the port's."""
    match = _LAYER.match(key)
    if match is None:
        return key
    side, number, name, rest = match.groups()
    return f"{side}.layers.{number}.{_LAYER_NAMES[side].get(name, name)}{rest}"


def _ours(key: str) -> str:
    """The port's key as ours."""
    match = _LAYER.match(key)
    if match is not None:
        side, number, name, rest = match.groups()
        back = {theirs: ours for ours, theirs in _LAYER_NAMES[side].items()}
        return f"{side}.layers.{number}.{back.get(name, name)}{rest}"
    for theirs, ours in _PREFIXES:
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return key


def hf_key(key: str) -> str:
    """Our key as the port's."""
    if key == EMBEDDING:
        return _TIED[0]
    for theirs, ours in _PREFIXES:
        if key.startswith(ours):
            return theirs + key[len(ours) :]
    return fairseq_to_hf(key)


def _is_unused(key: str) -> bool:
    """Our decoder has type embeddings, as OFASys's; no code reads them and OFA has none."""
    return key.startswith("decoder.adaptor.") and key.endswith("type_embedding.weight")


def load_hf_weights(model: OFAPlus, ledger: Ledger, replaced: Mapping[str, Tensor] | None = None) -> None:
    """Loads the model from a state dict in the port's names, of any float type; `ledger` accounts for every key.

    replaced: tensors to load in place of the stored ones, by our key. Raises CheckpointError for missing, unknown and
    misshapen keys.
    """
    own = {k: v for k, v in model.state_dict().items() if k not in TIED_KEYS}
    found: dict[str, Tensor] = {k: torch.zeros_like(v) for k, v in own.items() if _is_unused(k)}
    for key in ledger.stored:
        if key == _TYPES:
            rows = ledger.take(key, "the adaptors' type embeddings")
            found["encoder.adaptor.text.type_embedding.weight"] = rows[:1]
            found["encoder.adaptor.image_resnet.type_embedding.weight"] = rows[1:]
        elif key == _TIED[0]:
            found[EMBEDDING] = ledger.take(key, EMBEDDING)
        elif key in _TIED:
            ledger.tied(key, _TIED[0])
        elif _DERIVED.search(key):
            ledger.drop([key], "follows from the configuration")
        elif key.startswith("classification_heads."):
            ledger.drop([key], "of a classification head, which no task of OFA uses")
        elif _ours(key) in own:
            found[_ours(key)] = ledger.take(key, _ours(key))
    for key, tensor in own.items():
        if key not in found and key.endswith("num_batches_tracked"):
            found[key] = tensor
    found.update(replaced or {})
    ledger.finish(own, found)
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(found[key])


def to_hf_weights(model: OFAPlus) -> dict[str, Tensor]:
    """The model's tensors in the port's names, without its integer buffers (it computes them itself)."""
    config_to_hf(model.config)
    found: dict[str, Tensor] = {}
    types: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        if key.startswith("encoder.adaptor.") and key.endswith(".type_embedding.weight"):
            types[key.split(".")[2]] = tensor
        elif key not in TIED_KEYS and not _is_unused(key):
            found[hf_key(key)] = tensor.detach().clone()
    if types:
        found[_TYPES] = torch.cat([types["text"], types["image_resnet"]])
    for key in _TIED[1:]:
        found[key] = found[_TIED[0]].clone()
    return found

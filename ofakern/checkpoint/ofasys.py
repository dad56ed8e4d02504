"""OFASys's configuration and state-dict keys as ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ofakern.checkpoint.ledger import Ledger
from ofakern.errors import CheckpointError
from ofakern.modality.audio.adaptor import AudioFbankConfig, AudioTargetConfig
from ofakern.modality.image.adaptor import ImagePatchEmbedConfig, ImageResnetConfig, ImageVitConfig
from ofakern.modality.image.codes import ImageCodesConfig
from ofakern.modality.motion.adaptor import MotionConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.modality.video.adaptor import VideoConfig
from ofakern.model import TIED_KEYS, OFAConfig, OFAPlus
from ofakern.model.config import SIZES
from ofakern.nn.adaptor import AdaptorConfig

PAD = 1
EMBEDDING = "encoder.adaptor.embed_tokens.weight"

_AUDIO_OPTIONS = (
    "max_position",
    "output_frame_dim",
    "n_frames_per_step",
    "prenet_layers",
    "prenet_dim",
    "prenet_dropout",
    "postnet_conv_dim",
    "postnet_conv_kernel_size",
    "postnet_layers",
    "postnet_dropout",
)
# Adaptor option names of OFASys -> ours, per adaptor.
ADAPTOR_OPTIONS: dict[str, tuple[type[AdaptorConfig], dict[str, str]]] = {
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
    "image_vqgan": (ImageCodesConfig, {"code_bucket_size": "bucket_size"}),
    "audio_fbank": (AudioFbankConfig, {name: name for name in _AUDIO_OPTIONS}),
    "audio_tgt_fbank": (AudioTargetConfig, {name: name for name in _AUDIO_OPTIONS}),
    "video_image_sequence": (VideoConfig, {"token_bucket_size": "bucket_size"}),
    "motion_6d": (
        MotionConfig,
        {
            "max_position": "max_position",
            "token_bucket_size": "bucket_size",
            "max_data_dim": "max_data_dim",
            "max_noise_levels": "max_noise_levels",
        },
    ),
}
SAME_NAME = (
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
    "modal_ffn",
)
_DERIVED = re.compile(r"(_rp_bucket|_position_idx|\.version)$")
# OFASys builds both halves of an audio adaptor on both sides, and each side uses one; nothing reads the scale of
# positions. The embedding of masked spans is of its audio pretraining.
_AUDIO_UNUSED = re.compile(
    r"^(encoder\.adaptor\.audio_fbank\.(prenet|postnet|feat_proj|eos_proj)\.|encoder\.adaptor\.audio_tgt_fbank\.|"
    r"decoder\.adaptor\.audio_fbank\.subsample\.|.*\.pos_emb_alpha$)"
)
_AUDIO_MASK = re.compile(r"^(encoder|decoder)\.adaptor\.audio_fbank\.mask_emb$")


def config_from_ofasys(
    model: Mapping[str, Any], vocab_size: int, compat: str = "ofasys", keys: Iterable[str] = ()
) -> tuple[OFAConfig, list[str]]:
    """The configuration of an OFASys model dictionary, and the names of active adaptors that do not exist here.

    keys: of its state dict; an adaptor that has weights there is active, as that implementation has it.
    Raises CheckpointError for what this model cannot express.
    """
    try:
        model = _with_arch(model)
        encoder, decoder = model["encoder"], model["decoder"]
        for name in ("embed_dim", "ffn_embed_dim", "attention_heads", "normalize_before"):
            if encoder[name] != decoder[name]:
                raise CheckpointError(f"OFASys config: {name} must agree, got {encoder[name]} and {decoder[name]}")
        stored = {key.split(".")[2] for key in keys if ".adaptor." in key}
        adaptors = {n: o for n, o in model["adaptor"].items() if isinstance(o, dict)}
        active = {n: o for n, o in adaptors.items() if o.get("is_active") or n in stored}
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
            adaptors=tuple(_adaptor(name, options) for name, options in active.items() if name in ADAPTOR_OPTIONS),
            compat=compat,
            **{name: model[name] for name in SAME_NAME},
        )
    except KeyError as error:
        raise CheckpointError(f"OFASys config: options must all be there, got none for {error}") from error
    return config, sorted(set(active) - set(ADAPTOR_OPTIONS))


def _with_arch(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where `arch` names a published size, it overrules the widths and depths beside it."""
    arch = model.get("arch") or ""
    if not arch:
        return model
    if arch not in SIZES:
        raise CheckpointError(f"OFASys config: arch must be one of {sorted(SIZES)}, got {arch!r}")
    dim, ffn_dim, heads, encoder_layers, decoder_layers, backbone = SIZES[arch]
    size = {"embed_dim": dim, "ffn_embed_dim": ffn_dim, "attention_heads": heads}
    adaptors = dict(model["adaptor"])
    if "image_resnet" in adaptors:
        adaptors["image_resnet"] = {**adaptors["image_resnet"], "resnet_type": backbone}
    return {
        **model,
        "encoder": {**model["encoder"], **size, "layers": encoder_layers},
        "decoder": {**model["decoder"], **size, "layers": decoder_layers},
        "adaptor": adaptors,
    }


def load_ofasys_weights(
    model: OFAPlus, ledger: Ledger, missing_adaptors: list[str], replaced: Mapping[str, Tensor] | None = None
) -> None:
    """Loads the model from a state dict in OFASys's names; `ledger` then accounts for every key.

    missing_adaptors: active ones of the configuration that do not exist here: their keys are named and skipped.
    replaced: tensors to load in place of the stored ones (vocabulary rows in another order).
    Raises CheckpointError for missing, unknown and misshapen keys.
    """
    skipped = tuple(f"{side}.adaptor.{name}." for side in ("encoder", "decoder") for name in missing_adaptors)
    own = {k: v for k, v in model.state_dict().items() if k not in TIED_KEYS}
    found: dict[str, Tensor] = {}
    for key in own:
        if key in ledger.stored:
            found[key] = ledger.take(key)
            if replaced is not None and key in replaced:
                found[key] = replaced[key]
        elif key.endswith("num_batches_tracked"):  # a counter that nothing reads
            found[key] = own[key]
    for key in list(ledger.stored):
        if key in found:
            continue
        if _DERIVED.search(key):
            ledger.drop([key], "follows from the configuration")
        elif key in TIED_KEYS or key == "decoder.output_projection.weight":
            ledger.tied(key, EMBEDDING)
        elif key.startswith(skipped):
            ledger.drop([key], f"of an adaptor that does not exist here ({key.split('.')[2]})")
        elif model.config.entangle_position_embedding and key.startswith("decoder.cross_pos_"):
            ledger.drop([key], "built but never used with entangled positions")
        elif _AUDIO_UNUSED.match(key):
            ledger.drop([key], "of the audio adaptor's other half, which this side never uses")
        elif _AUDIO_MASK.match(key):
            ledger.drop([key], "of masked audio pretraining, which does not exist here")
    ledger.finish(own, found)
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(found[key])


def _adaptor(name: str, options: Mapping[str, Any]) -> AdaptorConfig:
    kind, renamed = ADAPTOR_OPTIONS[name]
    values = {ours: options[theirs] for theirs, ours in renamed.items()}
    shared = {f.name for f in fields(AdaptorConfig)} - {"scale_embedding"}
    values.update({field: options[field] for field in shared})
    if kind is ImageCodesConfig:
        values["window"] = options["code_image_size"] // options["vqgan_factor"]
    return kind(**values, scale_embedding=not options["no_scale_embedding"])

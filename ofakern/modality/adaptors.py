"""The adaptors by name, and the sides on which each exists."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from ofakern.errors import OfakernValueError
from ofakern.modality.audio.adaptor import (
    AudioFbankAdaptor,
    AudioFbankConfig,
    AudioFrameAdaptor,
    AudioTargetConfig,
)
from ofakern.modality.image.adaptor import (
    ImagePatchEmbedAdaptor,
    ImagePatchEmbedConfig,
    ImageResnetAdaptor,
    ImageResnetConfig,
    ImageVitAdaptor,
    ImageVitConfig,
)
from ofakern.modality.image.codes import ImageCodesAdaptor, ImageCodesConfig
from ofakern.modality.motion.adaptor import MotionAdaptor, MotionConfig
from ofakern.modality.text.adaptor import TextAdaptor, TextAdaptorConfig
from ofakern.modality.video.adaptor import VideoAdaptor, VideoConfig
from ofakern.nn.adaptor import Adaptor, AdaptorConfig, SideShape

_CONFIGS: dict[str, type[AdaptorConfig]] = {
    "text": TextAdaptorConfig,
    "image_resnet": ImageResnetConfig,
    "image_vit": ImageVitConfig,
    "image_patch_embed": ImagePatchEmbedConfig,
    "image_vqgan": ImageCodesConfig,
    "audio_fbank": AudioFbankConfig,
    "audio_tgt_fbank": AudioTargetConfig,
    "video_image_sequence": VideoConfig,
    "motion_6d": MotionConfig,
}
_SOURCE_ONLY = {"image_resnet", "image_vit", "video_image_sequence"}
_TARGET_ONLY = {"image_vqgan", "audio_tgt_fbank"}


def build_adaptor(config: AdaptorConfig, side: SideShape) -> Adaptor | None:
    """The adaptor of a config for one side; None where it does not exist on that side."""
    if config.name in (_TARGET_ONLY if side.source else _SOURCE_ONLY):
        return None
    if isinstance(config, TextAdaptorConfig):
        return TextAdaptor(config, side)
    if isinstance(config, ImageResnetConfig):
        return ImageResnetAdaptor(config, side)
    if isinstance(config, ImageVitConfig):
        return ImageVitAdaptor(config, side)
    if isinstance(config, ImagePatchEmbedConfig):
        return ImagePatchEmbedAdaptor(config, side)
    if isinstance(config, AudioFbankConfig):
        return AudioFbankAdaptor(config, side) if side.source else AudioFrameAdaptor(config, side)
    if isinstance(config, VideoConfig):
        return VideoAdaptor(config, side)
    if isinstance(config, MotionConfig):
        return MotionAdaptor(config, side)
    if isinstance(config, ImageCodesConfig):
        return ImageCodesAdaptor(config, side)
    raise OfakernValueError(f"build_adaptor: config must be of a known adaptor, got {type(config).__name__}")


def adaptor_config(name: str, options: dict[str, Any]) -> AdaptorConfig:
    """A config from plain data. Raises OfakernValueError for unknown names and options."""
    kind = _CONFIGS.get(name)
    if kind is None:
        raise OfakernValueError(f"adaptor_config: name must be one of {sorted(_CONFIGS)}, got {name!r}")
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise OfakernValueError(f"adaptor_config: options of {name!r} must be among {sorted(known)}, got {unknown}")
    return kind(**options)


def adaptor_options(config: AdaptorConfig) -> dict[str, Any]:
    """The config as plain data; `adaptor_config(config.name, ...)` reads it back."""
    return asdict(config)

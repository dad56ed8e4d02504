"""VIDEO: sampled frames in the source, each through the image backbone."""

from __future__ import annotations

from ofakern.instruction import Modality
from ofakern.modality.spec import SOURCE, AdaptorSpec, ModalitySpec, PreprocessorSpec

__all__ = ["SPEC"]

SPEC = ModalitySpec(
    modality=Modality.VIDEO,
    preprocessors={
        "video": PreprocessorSpec("video", ("video_image_sequence",), sides=SOURCE),
    },
    adaptors={
        "video_image_sequence": AdaptorSpec("video_image_sequence", sides=SOURCE),
    },
    default_preprocessor="video",
    default_adaptor="video_image_sequence",
)

"""VIDEO: sampled frames in the source, each through the image backbone."""

from __future__ import annotations

from ofakern.instruction import Modality
from ofakern.modality.spec import SOURCE, AdaptorSpec, ModalitySpec, PreprocessorSpec

__all__ = ["SPEC"]

_NOTE = "video is not available yet"

SPEC = ModalitySpec(
    modality=Modality.VIDEO,
    preprocessors={
        "video": PreprocessorSpec("video", ("video_image_sequence",), sides=SOURCE, available=False, note=_NOTE),
    },
    adaptors={
        "video_image_sequence": AdaptorSpec("video_image_sequence", sides=SOURCE, available=False, note=_NOTE),
    },
    default_preprocessor="video",
    default_adaptor="video_image_sequence",
    available=False,
    note=_NOTE,
)

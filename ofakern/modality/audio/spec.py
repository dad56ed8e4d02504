"""AUDIO: filter banks in the source (speech recognition), log-mel frames as a target (speech synthesis)."""

from __future__ import annotations

from ofakern.instruction import Modality
from ofakern.modality.spec import SOURCE, TARGET, AdaptorSpec, AttributeSpec, ModalitySpec, PreprocessorSpec, attributes

__all__ = ["SPEC"]

_NOTE = "audio is not available yet"

SPEC = ModalitySpec(
    modality=Modality.AUDIO,
    preprocessors={
        "audio": PreprocessorSpec(
            "audio",
            ("audio_fbank", "audio_tgt_fbank"),
            attributes(AttributeSpec("n_frames_per_step", "int", "frames packed into one step", minimum=1)),
            criterion="tacotron2",
            generator="mel_frames",
            postprocess="audio",
            available=False,
            note=_NOTE,
        ),
        "audio_embed": PreprocessorSpec("audio_embed", ("audio_fbank",), sides=SOURCE, available=False, note=_NOTE),
    },
    adaptors={
        "audio_fbank": AdaptorSpec(
            "audio_fbank",
            attributes(AttributeSpec("use_mask", "flag", "training: put the mask embedding on masked spans")),
            sides=SOURCE,
            available=False,
            note=_NOTE,
        ),
        "audio_tgt_fbank": AdaptorSpec("audio_tgt_fbank", sides=TARGET, available=False, note=_NOTE),
    },
    default_preprocessor="audio",
    default_adaptor="audio_fbank",
    available=False,
    note=_NOTE,
)

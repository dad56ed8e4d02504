"""AUDIO: filter banks in the source (speech recognition), log-mel frames as a target (speech synthesis)."""

from __future__ import annotations

from ofakern.instruction import Modality
from ofakern.modality.spec import SOURCE, TARGET, AdaptorSpec, AttributeSpec, ModalitySpec, PreprocessorSpec, attributes

__all__ = ["SPEC"]

SPEC = ModalitySpec(
    modality=Modality.AUDIO,
    preprocessors={
        "audio": PreprocessorSpec(
            "audio",
            ("audio_fbank", "audio_tgt_fbank"),
            attributes(
                AttributeSpec("n_frames_per_step", "int", "frames packed into one step", minimum=1),
                AttributeSpec("normalize", "flag", "mean 0, deviation 1 per mel bin and utterance", sides=SOURCE),
                AttributeSpec(
                    "freq_mask", "int", "training: up to so many neighbouring mel bins hidden", minimum=0, sides=SOURCE
                ),
                AttributeSpec(
                    "time_mask", "int", "training: up to so many neighbouring frames hidden", minimum=0, sides=SOURCE
                ),
            ),
            criterion="tacotron2",
            generator="mel_frames",
            postprocess="audio",
        ),
        "audio_embed": PreprocessorSpec(
            "audio_embed",
            ("audio_fbank",),
            sides=SOURCE,
            available=False,
            note="no adaptor reads these features, in OFASys neither",
        ),
    },
    adaptors={
        "audio_fbank": AdaptorSpec(
            "audio_fbank",
            attributes(
                AttributeSpec(
                    "use_mask",
                    "flag",
                    "training: put the mask embedding on masked spans",
                    no_effect="spans are masked by OFASys's audio pretraining only",
                )
            ),
        ),
        "audio_tgt_fbank": AdaptorSpec("audio_tgt_fbank", sides=TARGET),
    },
    default_preprocessor="audio",
    default_adaptor="audio_fbank",
)

"""TEXT: words. The attributes here are shared by every modality whose slots become tokens of the text vocabulary."""

from __future__ import annotations

from ofakern.instruction import Modality
from ofakern.modality.spec import SOURCE, TARGET, AdaptorSpec, AttributeSpec, ModalitySpec, PreprocessorSpec, attributes

__all__ = ["MAX_LENGTH", "NOISE", "NORMALISE", "NO_LOSS", "SPEC", "TEXT_ADAPTOR"]

TEXT_ADAPTOR = AdaptorSpec("text")

NO_LOSS = AttributeSpec(
    "no_loss", "flag", "given to the model, not learnt; at the head of a target it is the forced prefix", sides=TARGET
)
MAX_LENGTH = AttributeSpec("max_length", "int", "keep this many tokens", minimum=1)
NORMALISE = (
    AttributeSpec("uncased", "flag", "lower-case"),
    AttributeSpec("no_punctuation", "flag", "drop ASCII punctuation, squeeze blanks"),
)
NOISE = (
    AttributeSpec("noise_ratio", "float", "training: share of input tokens replaced at random", minimum=0, maximum=1),
    AttributeSpec("mask_ratio", "float", "training: share of input tokens masked in spans", minimum=0, maximum=1),
)

_ATTRIBUTES = attributes(
    NO_LOSS,
    MAX_LENGTH,
    *NORMALISE,
    *NOISE,
    AttributeSpec("closed_set", "flag", "the answer is one of the task's closed set", sides=TARGET),
    AttributeSpec(
        "disable_auto_boseos", "flag", "no BOS and EOS around the text group that holds this slot", sides=SOURCE
    ),
    AttributeSpec(
        "is_label", "flag", "marks the label", sides=TARGET, no_effect="every target slot with loss is a label"
    ),
    AttributeSpec("add_bos", "flag", "begin with BOS", no_effect="each text group begins with BOS already"),
    AttributeSpec("add_eos", "flag", "end with EOS", no_effect="each text group ends with EOS already"),
)

SPEC = ModalitySpec(
    modality=Modality.TEXT,
    preprocessors={
        "text": PreprocessorSpec("text", ("text",), _ATTRIBUTES),
        "text_phone": PreprocessorSpec(
            "text_phone",
            ("text",),
            _ATTRIBUTES,
            criterion="label_smoothed_cross_entropy+ctc",
            available=False,
            note="the CTC loss over phones is not available yet",
        ),
    },
    adaptors={"text": TEXT_ADAPTOR},
    default_preprocessor="text",
    default_adaptor="text",
    text_like=True,
)

"""PHONE: phones separated by blanks, tokens of their own among the text tokens."""

from __future__ import annotations

from ofakern.instruction import Modality
from ofakern.modality.spec import SOURCE, AttributeSpec, ModalitySpec, PreprocessorSpec, attributes
from ofakern.modality.text.spec import NO_LOSS, TEXT_ADAPTOR

__all__ = ["SPEC"]

SPEC = ModalitySpec(
    modality=Modality.PHONE,
    preprocessors={
        "phone": PreprocessorSpec(
            "phone",
            ("text",),
            attributes(
                NO_LOSS,
                AttributeSpec(
                    "mask_ratio", "float", "training: share of phones masked", minimum=0, maximum=1, sides=SOURCE
                ),
            ),
            postprocess="phone",
        ),
    },
    adaptors={"text": TEXT_ADAPTOR},
    default_preprocessor="phone",
    default_adaptor="text",
    text_like=True,
)

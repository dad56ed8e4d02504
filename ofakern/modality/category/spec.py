"""CATEGORY: one class of a fixed list, predicted from one pooled vector."""

from __future__ import annotations

from ofakern.instruction import Modality
from ofakern.modality.spec import TARGET, ModalitySpec, PreprocessorSpec, attributes
from ofakern.modality.text.spec import NORMALISE, TEXT_ADAPTOR

__all__ = ["SPEC"]

_NOTE = "the pooling decoder is not available yet; [TEXT:name,closed_set] answers from a closed set"

SPEC = ModalitySpec(
    modality=Modality.CATEGORY,
    preprocessors={
        "category": PreprocessorSpec(
            "category",
            ("text",),
            attributes(*NORMALISE),
            sides=TARGET,
            criterion="cross_entropy",
            generator="category",
            postprocess="category",
            available=False,
            note=_NOTE,
        ),
    },
    adaptors={"text": TEXT_ADAPTOR},
    default_preprocessor="category",
    default_adaptor="text",
    available=False,
    note=_NOTE,
)

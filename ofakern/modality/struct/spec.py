"""STRUCT: tables and databases, written out as text."""

from __future__ import annotations

from ofakern.instruction import Modality
from ofakern.modality.spec import AttributeSpec, ModalitySpec, PreprocessorSpec, attributes
from ofakern.modality.text.spec import MAX_LENGTH, NO_LOSS, NOISE, NORMALISE, TEXT_ADAPTOR

__all__ = ["SPEC"]

_COLUMN_TYPES = AttributeSpec("col_type", "str", "kind of each column, c (cell) or k (relation): c:k:c")

SPEC = ModalitySpec(
    modality=Modality.STRUCT,
    preprocessors={
        "table": PreprocessorSpec(
            "table",
            ("text",),
            attributes(NO_LOSS, MAX_LENGTH, *NORMALISE, *NOISE, _COLUMN_TYPES),
            postprocess="struct",
        ),
        "database": PreprocessorSpec(
            "database",
            ("text",),
            attributes(NO_LOSS, MAX_LENGTH, *NORMALISE, *NOISE),
            postprocess="struct",
            available=False,
            note="reading SQLite databases is not available yet",
        ),
    },
    adaptors={"text": TEXT_ADAPTOR},
    default_preprocessor="table",
    default_adaptor="text",
    text_like=True,
)

"""BOX: a rectangle in an image of the source, as four coordinate bins among the text tokens."""

from __future__ import annotations

from ofakern.instruction import Modality
from ofakern.modality.spec import AttributeSpec, ModalitySpec, PreprocessorSpec, attributes
from ofakern.modality.text.spec import NO_LOSS, TEXT_ADAPTOR

__all__ = ["SPEC"]

_IMAGE = AttributeSpec(
    "image", "str", "the IMAGE slot of the source whose pixels the coordinates count; else the first"
)

SPEC = ModalitySpec(
    modality=Modality.BOX,
    preprocessors={
        "box": PreprocessorSpec("box", ("text",), attributes(NO_LOSS, _IMAGE), generator="box", postprocess="box"),
    },
    adaptors={"text": TEXT_ADAPTOR},
    default_preprocessor="box",
    default_adaptor="text",
    text_like=True,
)

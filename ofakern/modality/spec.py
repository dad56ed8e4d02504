"""What a modality accepts, as data: the planner types attributes against it and prints it, nothing here runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ofakern.instruction import Modality

__all__ = [
    "BOTH",
    "SOURCE",
    "TARGET",
    "AdaptorSpec",
    "AttributeSpec",
    "AttributeValue",
    "ModalitySpec",
    "PreprocessorSpec",
    "Side",
    "attributes",
]

Side = Literal["source", "target"]
AttributeValue = bool | int | float | str

SOURCE: tuple[Side, ...] = ("source",)
TARGET: tuple[Side, ...] = ("target",)
BOTH: tuple[Side, ...] = ("source", "target")


@dataclass(frozen=True, slots=True)
class AttributeSpec:
    """One attribute: its type, its range (both ends inside), the sides where it may stand.

    A flag is written alone, or as ``=true`` / ``=false``. ``no_effect`` says why an attribute that OFASys's
    instructions carry changes nothing; the plan repeats it as a note.
    """

    name: str
    kind: Literal["flag", "int", "float", "str"]
    meaning: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    sides: tuple[Side, ...] = BOTH
    no_effect: str = ""


@dataclass(frozen=True, slots=True)
class PreprocessorSpec:
    """Raw value -> tensors, and for a target the way back.

    adaptors: those that take its output, the preferred one first (the first that may stand on the slot's side is the
    default). criterion, generator, postprocess: what trains, produces and decodes it as a target.
    """

    name: str
    adaptors: tuple[str, ...]
    attributes: Mapping[str, AttributeSpec] = field(default_factory=dict)
    sides: tuple[Side, ...] = BOTH
    criterion: str = "label_smoothed_cross_entropy"
    generator: str = "sequence"
    postprocess: str = "text"
    available: bool = True
    note: str = ""


@dataclass(frozen=True, slots=True)
class AdaptorSpec:
    """Tensors -> embeddings (and back, on the target side)."""

    name: str
    attributes: Mapping[str, AttributeSpec] = field(default_factory=dict)
    sides: tuple[Side, ...] = BOTH
    available: bool = True
    note: str = ""


@dataclass(frozen=True, slots=True)
class ModalitySpec:
    """One modality. ``text_like``: consecutive slots of such modalities merge into one group with one BOS and EOS."""

    modality: Modality
    preprocessors: Mapping[str, PreprocessorSpec]
    adaptors: Mapping[str, AdaptorSpec]
    default_preprocessor: str
    default_adaptor: str
    default_target_preprocessor: str = ""
    text_like: bool = False
    available: bool = True
    note: str = ""

    def preprocessor_for(self, side: Side) -> str:
        """The preprocessor of a slot that names none."""
        if side == "target" and self.default_target_preprocessor:
            return self.default_target_preprocessor
        return self.default_preprocessor


def attributes(*specs: AttributeSpec) -> dict[str, AttributeSpec]:
    """The specs by name."""
    return {spec.name: spec for spec in specs}

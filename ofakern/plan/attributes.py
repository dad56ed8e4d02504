"""Typing a slot: which preprocessor and adaptor it takes, and its attributes' values, each error under its place."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from ofakern.instruction import Attribute, Instruction, Slot, Span, close_match, instruction_error
from ofakern.modality.registry import SPECS
from ofakern.modality.spec import AdaptorSpec, AttributeSpec, AttributeValue, ModalitySpec, PreprocessorSpec, Side

__all__ = ["TypedSlot", "fail", "type_slot"]

_CHOICES = ("preprocess", "adaptor")
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_TRUE_FALSE = {"true": True, "false": False}
_MEANT_FLAG = {"1": "true", "yes": "true", "on": "true", "0": "false", "no": "false", "off": "false"}


@dataclass(frozen=True, slots=True)
class TypedSlot:
    """A slot with everything it left open decided."""

    preprocessor: PreprocessorSpec
    adaptor: AdaptorSpec
    attributes: tuple[tuple[str, AttributeValue], ...]


def fail(
    instruction: Instruction, span: Span, message: str, *, meant: str | None = None, hint: str | None = None
) -> NoReturn:
    """Raises the InstructionError with the caret under ``span``."""
    raise instruction_error(instruction.text, span, message, meant=meant, hint=hint)


def type_slot(instruction: Instruction, slot: Slot, side: Side, default_adaptor: str | None) -> TypedSlot:
    """The slot's preprocessor, adaptor and typed attributes. ``default_adaptor`` goes before the modality's own
    default wherever the preprocessor and the side allow it. Raises InstructionError."""
    spec = SPECS[slot.modality]
    given = {attribute.key: attribute for attribute in slot.attributes}
    adaptor = _choice(instruction, slot, given.get("adaptor"), spec.adaptors)
    preprocess = _choice(instruction, slot, given.get("preprocess"), spec.preprocessors)
    preprocessor = spec.preprocessors[preprocess or _preprocessor_for(spec, adaptor, side)]
    if side not in preprocessor.sides:
        _fail_side(instruction, slot, given.get("preprocess"), f"preprocessor {preprocessor.name!r}", side)
    if adaptor is None:
        adaptor = _adaptor_for(spec, preprocessor, side, default_adaptor)
    elif adaptor not in preprocessor.adaptors:
        fail(
            instruction,
            given["adaptor"].value_span,
            f"the adaptor of preprocessor {preprocessor.name!r} must be one of {', '.join(preprocessor.adaptors)}, "
            f"got {adaptor!r}",
        )
    if side not in spec.adaptors[adaptor].sides:
        _fail_side(instruction, slot, given.get("adaptor"), f"adaptor {adaptor!r}", side)
    known = {**spec.adaptors[adaptor].attributes, **preprocessor.attributes}
    typed = tuple(
        (attribute.key, _typed(instruction, slot, attribute, known, side))
        for attribute in slot.attributes
        if attribute.key not in _CHOICES
    )
    return TypedSlot(preprocessor, spec.adaptors[adaptor], typed)


def _choice(
    instruction: Instruction, slot: Slot, attribute: Attribute | None, known: Mapping[str, object]
) -> str | None:
    """The value of `preprocess=` or `adaptor=`, which must be one of ``known``."""
    if attribute is None:
        return None
    rule = f"attribute {attribute.key!r} of {slot.modality.name} must be one of {', '.join(known)}"
    if attribute.value is None:
        fail(instruction, attribute.span, f"{rule}, got no value", hint=f"{attribute.key}={next(iter(known))}")
    if attribute.value not in known:
        near = close_match(attribute.value, known)
        fail(instruction, attribute.value_span, f"{rule}, got {attribute.value!r}", meant=f"'{near}'" if near else None)
    return attribute.value


def _preprocessor_for(spec: ModalitySpec, adaptor: str | None, side: Side) -> str:
    """The default, unless the chosen adaptor needs another one."""
    default = spec.preprocessor_for(side)
    if adaptor is None or adaptor in spec.preprocessors[default].adaptors:
        return default
    return next((name for name, one in spec.preprocessors.items() if adaptor in one.adaptors), default)


def _adaptor_for(spec: ModalitySpec, preprocessor: PreprocessorSpec, side: Side, wanted: str | None) -> str:
    order = (wanted, spec.default_adaptor, *preprocessor.adaptors)
    fitting = (
        name
        for name in order
        if name is not None and name in preprocessor.adaptors and side in spec.adaptors[name].sides
    )
    return next(fitting, preprocessor.adaptors[0])


def _fail_side(instruction: Instruction, slot: Slot, attribute: Attribute | None, what: str, side: Side) -> NoReturn:
    other = "source" if side == "target" else "target"
    span = slot.modality_span if attribute is None else attribute.value_span
    spec = SPECS[slot.modality]
    fits = [
        one.name
        for one in spec.preprocessors.values()
        if side in one.sides and any(side in spec.adaptors[name].sides for name in one.adaptors)
    ]
    hint = f"[{slot.modality.name}:{slot.name or 'name'},preprocess={fits[0]}]" if fits else None
    fail(
        instruction, span, f"{what} of {slot.modality.name} must stand in the {other}, got it in the {side}", hint=hint
    )


def _typed(
    instruction: Instruction, slot: Slot, attribute: Attribute, known: Mapping[str, AttributeSpec], side: Side
) -> AttributeValue:
    spec = known.get(attribute.key)
    if spec is None:
        _fail_unknown(instruction, slot, attribute, known, side)
    if side not in spec.sides:
        fail(
            instruction,
            attribute.key_span,
            f"attribute {spec.name!r} of {slot.modality.name} must stand in the {spec.sides[0]}, got it in the {side}",
        )
    if spec.kind == "flag":
        return _flag(instruction, slot, attribute)
    rule = f"attribute {spec.name!r} of {slot.modality.name} must be {_rule(spec)}"
    if attribute.value is None:
        fail(instruction, attribute.span, f"{rule}, got no value", hint=f"{spec.name}={_example(spec)}")
    value = _converted(spec, attribute.value)
    if value is None:
        near = close_match(attribute.value, spec.choices)
        meant = f"'{near}'" if near else None
        fail(instruction, attribute.value_span, f"{rule}, got {attribute.value!r}", meant=meant)
    return value


def _fail_unknown(
    instruction: Instruction, slot: Slot, attribute: Attribute, known: Mapping[str, AttributeSpec], side: Side
) -> NoReturn:
    modality = slot.modality.name
    accepted = (*_CHOICES, *(name for name, spec in known.items() if side in spec.sides))
    near = close_match(attribute.key, accepted)
    meant = f"'{near}'" if near else None
    hint = None
    other = [name for name, one in SPECS[slot.modality].preprocessors.items() if attribute.key in one.attributes]
    if other:
        meant, hint = None, f"preprocess={other[0]} accepts it"
    elif near is None and slot.name is None and attribute.value is None:
        meant = f"'[{modality}:{attribute.key}]'"
    elif near is None:
        hint = f"one of {', '.join(accepted)}"
    message = f"attribute must be one that {modality} accepts in the {side}, got {attribute.key!r}"
    fail(instruction, attribute.key_span, message, meant=meant, hint=hint)


def _flag(instruction: Instruction, slot: Slot, attribute: Attribute) -> bool:
    if attribute.value is None:
        return True
    if attribute.value in _TRUE_FALSE:
        return _TRUE_FALSE[attribute.value]
    lowered = attribute.value.lower()
    near = lowered if lowered in _TRUE_FALSE else _MEANT_FLAG.get(lowered)
    fail(
        instruction,
        attribute.value_span,
        f"attribute {attribute.key!r} of {slot.modality.name} must be a flag (alone, or =true, =false), "
        f"got {attribute.value!r}",
        meant=f"'{near}'" if near else None,
    )


def _converted(spec: AttributeSpec, text: str) -> AttributeValue | None:
    """The value, or None when the text is not one that the spec allows."""
    if spec.kind == "str":
        return text if not spec.choices or text in spec.choices else None
    if not (_WHOLE if spec.kind == "int" else _NUMBER).fullmatch(text):
        return None
    value = int(text) if spec.kind == "int" else float(text)
    low = -math.inf if spec.minimum is None else spec.minimum
    high = math.inf if spec.maximum is None else spec.maximum
    return value if low <= value <= high and math.isfinite(value) else None


def _rule(spec: AttributeSpec) -> str:
    if spec.kind == "str":
        return f"one of {', '.join(spec.choices)}" if spec.choices else "text"
    kind = "a whole number" if spec.kind == "int" else "a number"
    if spec.maximum is not None:
        return f"{kind} from {spec.minimum:g} to {spec.maximum:g}" if spec.minimum is not None else kind
    return f"{kind} of at least {spec.minimum:g}" if spec.minimum is not None else kind


def _example(spec: AttributeSpec) -> str:
    return {"int": "30", "float": "0.3", "str": spec.choices[0] if spec.choices else "VALUE", "flag": "true"}[spec.kind]

"""The plan of one instruction: plain data, comparable, hashable, serialisable. `build` makes it, `table` prints it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ofakern.errors import CheckpointError, OfakernRuntimeError
from ofakern.instruction import Attribute, Modality
from ofakern.modality.registry import SPECS
from ofakern.modality.spec import AttributeSpec, AttributeValue, Side

__all__ = ["FORMAT", "VERSION", "Plan", "PlanSegment", "PlanSlot"]

FORMAT = "ofakern.plan"
VERSION = 1


@dataclass(frozen=True, slots=True)
class PlanSlot:
    """One slot, or one piece of plain text (``name`` is "" and ``text`` is not).

    name: the data column; an unnamed slot takes its place among the instruction's slots ("0", "1", ...).
    attributes: typed values in written order, without `preprocess` and `adaptor`. loss: whether its tokens are learnt
    (never in the source). generator: how the target side comes by it ("" in the source): `forced` is known text at the
    head of the target, `separator` known text later on; `sequence`, `closed_set` (the answers' trie), `box` (exactly
    four bins), ... are generated. postprocess: what turns the tokens into a value ("" when nothing is generated).
    group: number of the repeated group it stands in; its column then holds a list. image: for BOX, the column of the
    image its coordinates count in ("" when the source has none).
    """

    modality: Modality
    name: str
    text: str
    preprocess: str
    adaptor: str
    attributes: tuple[tuple[str, AttributeValue], ...]
    loss: bool
    generator: str
    postprocess: str
    group: int | None
    image: str

    @property
    def plain(self) -> bool:
        """Whether this is plain text of the instruction."""
        return not self.name

    def attribute(self, key: str, default: AttributeValue | None = None) -> AttributeValue | None:
        """The typed value of attribute ``key``, or ``default`` when the slot does not carry it."""
        return dict(self.attributes).get(key, default)

    def flag(self, key: str) -> bool:
        """Whether flag ``key`` is set."""
        return self.attribute(key) is True

    def attribute_spec(self, key: str) -> AttributeSpec | None:
        """What the slot's preprocessor or adaptor says about ``key``."""
        spec = SPECS[self.modality]
        return {**spec.adaptors[self.adaptor].attributes, **spec.preprocessors[self.preprocess].attributes}.get(key)

    def __str__(self) -> str:
        if self.plain:
            return f'"{self.text}"' if '"' not in self.text else repr(self.text)
        written = [Attribute(key, None if value is True else _written(value)) for key, value in self.attributes]
        return f"[{self.modality.name}:{self.name}{''.join(f',{attribute}' for attribute in written)}]"

    def unavailable(self) -> str:
        """Why the slot cannot run yet, or ""."""
        spec = SPECS[self.modality]
        parts = (spec, spec.preprocessors[self.preprocess], spec.adaptors[self.adaptor])
        for part in parts:
            if not part.available:
                return part.note
        if self.modality is Modality.BOX and not self.image:
            return "a box needs an IMAGE slot in the source: its coordinates count that image's pixels"
        return ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "modality": self.modality.name,
            "name": self.name,
            "text": self.text,
            "preprocess": self.preprocess,
            "adaptor": self.adaptor,
            "attributes": dict(self.attributes),
            "loss": self.loss,
            "generator": self.generator,
            "postprocess": self.postprocess,
            "group": self.group,
            "image": self.image,
        }

    @classmethod
    def from_dict(cls, data: object) -> PlanSlot:
        kinds: dict[str, type | tuple[type, ...]] = {
            "modality": str,
            "name": str,
            "text": str,
            "preprocess": str,
            "adaptor": str,
            "attributes": dict,
            "loss": bool,
            "generator": str,
            "postprocess": str,
            "group": (int, type(None)),
            "image": str,
        }
        read = _read(data, kinds, "a slot")
        read["modality"] = _modality(read["modality"])
        for key, value in read["attributes"].items():
            if not isinstance(value, AttributeValue):
                raise CheckpointError(f"plan: attribute {key!r} must be true, false, a number or text, got {value!r}")
        read["attributes"] = tuple(read["attributes"].items())
        slot = cls(**read)
        spec = SPECS[slot.modality]
        _check_known("preprocess", slot.preprocess, spec.preprocessors)
        _check_known("adaptor", slot.adaptor, spec.adaptors)
        return slot


@dataclass(frozen=True, slots=True)
class PlanSegment:
    """What one adaptor embeds as one run of tokens: a merged group of text-like slots, or one slot of another kind.

    index: its number in the plan, source first. modality, adaptor: the first slot's. criterion: what trains it ("" in
    the source, or when none of its slots has a loss). group: the repeated group the whole segment stands in, when that
    group mixes kinds; all segments of the group then repeat together, and the columns of its slots hold lists.
    """

    index: int
    side: Side
    modality: Modality
    adaptor: str
    slots: tuple[PlanSlot, ...]
    criterion: str
    group: int | None

    @property
    def text_like(self) -> bool:
        """Whether it is tokens of the text vocabulary, between one BOS and one EOS."""
        return SPECS[self.modality].text_like

    @property
    def auto_bos_eos(self) -> bool:
        """Whether BOS and EOS go around it: text-like and no slot of it says `disable_auto_boseos`."""
        return self.text_like and not any(slot.flag("disable_auto_boseos") for slot in self.slots)

    @property
    def generator(self) -> str:
        """What generates it ("" in the source): `sequence` for a text group, whose slots then say what they allow."""
        if self.side == "source":
            return ""
        return "sequence" if self.text_like else self.slots[0].generator

    def runs(self) -> Iterator[tuple[int | None, tuple[PlanSlot, ...]]]:
        """Consecutive slots of the same repeated group (its number), or of none (None), in order."""
        for group, slots in groupby(self.slots, key=lambda slot: slot.group):
            yield group, tuple(slots)

    def to_dict(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "side": self.side,
            "modality": self.modality.name,
            "adaptor": self.adaptor,
            "criterion": self.criterion,
            "group": self.group,
            "slots": [slot.to_dict() for slot in self.slots],
        }

    @classmethod
    def from_dict(cls, data: object, side: Side) -> PlanSegment:
        kinds: dict[str, type | tuple[type, ...]] = {
            "index": int,
            "side": str,
            "modality": str,
            "adaptor": str,
            "criterion": str,
            "group": (int, type(None)),
            "slots": list,
        }
        read = _read(data, kinds, "a segment")
        if read["side"] != side:
            raise CheckpointError(f"plan: a segment's side must be {side!r}, got {read['side']!r}")
        read["modality"] = _modality(read["modality"])
        read["slots"] = tuple(PlanSlot.from_dict(slot) for slot in read["slots"])
        if not read["slots"]:
            raise CheckpointError("plan: a segment must hold at least one slot, got none")
        return cls(**read)


@dataclass(frozen=True, slots=True)
class Plan:
    """One alternative of an instruction, ready to run. ``instruction`` is its canonical text."""

    instruction: str
    source: tuple[PlanSegment, ...]
    target: tuple[PlanSegment, ...]

    def __str__(self) -> str:
        return self.table()

    @property
    def segments(self) -> tuple[PlanSegment, ...]:
        """Source, then target; ``segments[i].index == i``."""
        return (*self.source, *self.target)

    @property
    def slots(self) -> tuple[PlanSlot, ...]:
        """All slots and plain texts in reading order."""
        return tuple(slot for segment in self.segments for slot in segment.slots)

    @property
    def target_slots(self) -> tuple[PlanSlot, ...]:
        """Slots and plain texts of the target in reading order; a token's target-slot id counts these."""
        return tuple(slot for segment in self.target for slot in segment.slots)

    @property
    def criterion(self) -> str:
        """The loss: the target segments' criteria, joined by " + " when they differ."""
        return " + ".join(dict.fromkeys(segment.criterion for segment in self.target if segment.criterion))

    @property
    def generator(self) -> str:
        """What generates the target: the target segments' generators, joined by " + " when they differ."""
        return " + ".join(dict.fromkeys(segment.generator for segment in self.target))

    @property
    def closed_set(self) -> bool:
        """Whether a slot answers from a closed set, which the loss and the search then both follow."""
        return any(slot.flag("closed_set") for slot in self.target_slots)

    @property
    def source_columns(self) -> tuple[str, ...]:
        """Columns of the source, each once, in reading order: always needed."""
        return _names(self.source)

    @property
    def target_columns(self) -> tuple[str, ...]:
        """Columns of the target, each once, in reading order; one that the source has too is copied from there."""
        return _names(self.target)

    def required_columns(self, *, training: bool) -> tuple[str, ...]:
        """Columns a row must have: all for training; for inference those of the source and of `no_loss` slots."""
        given = (slot.name for slot in self.target_slots if slot.name and (training or not slot.loss))
        return tuple(dict.fromkeys((*self.source_columns, *given)))

    def require_available(self) -> None:
        """Raises OfakernRuntimeError, naming the slot and the reason, when a slot cannot run yet."""
        for slot in self.slots:
            reason = slot.unavailable()
            if reason:
                raise OfakernRuntimeError(f"plan: slot {slot} must be of a kind that runs already, got: {reason}")

    def table(self) -> str:
        """The plan as an aligned table for people."""
        from ofakern.plan.table import render  # table.py reads these classes, so it cannot come first

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data with the format's name and version; `from_dict` gives an equal plan."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "instruction": self.instruction,
            "source": [segment.to_dict() for segment in self.source],
            "target": [segment.to_dict() for segment in self.target],
        }

    @classmethod
    def from_dict(cls, data: object) -> Plan:
        """The plan that `to_dict` wrote. Raises CheckpointError when the data is not one of this version."""
        kinds: dict[str, type | tuple[type, ...]] = {
            "format": str,
            "version": int,
            "instruction": str,
            "source": list,
            "target": list,
        }
        read = _read(data, kinds, "a plan")
        if (read["format"], read["version"]) != (FORMAT, VERSION):
            raise CheckpointError(f"plan: data must be {FORMAT} {VERSION}, got {read['format']} {read['version']}")
        source = tuple(PlanSegment.from_dict(segment, "source") for segment in read["source"])
        target = tuple(PlanSegment.from_dict(segment, "target") for segment in read["target"])
        if [segment.index for segment in (*source, *target)] != list(range(len(source) + len(target))):
            raise CheckpointError("plan: segments must be numbered 0, 1, ..., source first")
        return cls(read["instruction"], source, target)


def _written(value: AttributeValue) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _names(segments: tuple[PlanSegment, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(slot.name for segment in segments for slot in segment.slots if slot.name))


def _read(data: object, kinds: Mapping[str, type | tuple[type, ...]], what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise CheckpointError(f"plan: {what} must be an object, got {type(data).__name__}")
    if set(data) != set(kinds):
        missing, extra = sorted(set(kinds) - set(data)), sorted(map(str, set(data) - set(kinds)))
        raise CheckpointError(f"plan: {what} must have keys {', '.join(kinds)}, got missing {missing}, extra {extra}")
    for key, kind in kinds.items():
        if not isinstance(data[key], kind):
            raise CheckpointError(f"plan: {what}'s {key} must be {kind}, got {data[key]!r}")
    return dict(data)


def _modality(name: str) -> Modality:
    if name not in Modality.__members__:
        raise CheckpointError(f"plan: modality must be one of {', '.join(Modality.__members__)}, got {name!r}")
    return Modality[name]


def _check_known(what: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise CheckpointError(f"plan: {what} must be one of {', '.join(known)}, got {name!r}")

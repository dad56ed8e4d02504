"""Instruction -> `Plan`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.instruction import Group, Instruction, Modality, Node, PlainText, Slot, parse
from ofakern.modality.registry import SPECS
from ofakern.modality.spec import Side
from ofakern.plan.attributes import fail, type_slot
from ofakern.plan.nodes import Plan, PlanSegment, PlanSlot

__all__ = ["build_plan", "build_plans"]

_ANSWER = "-> [TEXT:answer]"


@dataclass(frozen=True, slots=True)
class _Placed:
    """A leaf of the tree with its side, the repeated group around it, and its column."""

    node: Slot | PlainText
    side: Side
    group: int | None
    name: str


def build_plan(instruction: str | Instruction, *, default_image_adaptor: str | None = None) -> Plan:
    """The plan of an instruction with one alternative.

    default_image_adaptor: the adaptor of source IMAGE slots that name none (`image_resnet` unless given); a model that
    was built with another image backbone passes its own.

    Raises InstructionError (caret and suggestion) for a malformed instruction, OfakernValueError when ``instruction``
    holds several alternatives (`build_plans` takes those) or ``default_image_adaptor`` is unknown.
    """
    plans = build_plans(instruction, default_image_adaptor=default_image_adaptor)
    if len(plans) != 1:
        raise OfakernValueError(
            f"build_plan: instruction must hold one alternative, got {len(plans)}\nTry: build_plans(...)"
        )
    return plans[0]


def build_plans(instruction: str | Instruction, *, default_image_adaptor: str | None = None) -> tuple[Plan, ...]:
    """One plan for each `|||` alternative; see `build_plan`."""
    _check_default(default_image_adaptor)
    if isinstance(instruction, Instruction) and instruction.text:
        alternatives: tuple[Instruction, ...] = (instruction,)
    elif isinstance(instruction, str | Instruction):
        # A tree made by hand has no places to point at: its canonical text gives it some.
        alternatives = parse(str(instruction))
    else:
        raise OfakernTypeError(
            f"build_plan: instruction must be a str or an Instruction, got {type(instruction).__name__}"
        )
    return tuple(_build(one, default_image_adaptor) for one in alternatives)


def _check_default(adaptor: str | None) -> None:
    known = [name for name, spec in SPECS[Modality.IMAGE].adaptors.items() if "source" in spec.sides]
    if adaptor is not None and adaptor not in known:
        raise OfakernValueError(f"build_plan: default_image_adaptor must be one of {', '.join(known)}, got {adaptor!r}")


def _build(instruction: Instruction, image_adaptor: str | None) -> Plan:
    leaves = list(_place(instruction))
    _check_names(instruction, leaves)
    images = tuple(leaf.name for leaf in leaves if leaf.side == "source" and _is(leaf, Modality.IMAGE))
    slots = [_plan_slot(instruction, leaf, images, image_adaptor) for leaf in leaves]
    _check_answers(instruction, leaves, slots)
    placed = list(zip(leaves, _generators(leaves, slots), strict=True))
    source = _segments([slot for leaf, slot in placed if leaf.side == "source"], "source", 0)
    target = _segments([slot for leaf, slot in placed if leaf.side == "target"], "target", len(source))
    if not any(segment.criterion for segment in target):
        last = [leaf.node for leaf in leaves if leaf.side == "target" and leaf.name][-1]
        fail(
            instruction,
            last.span,
            "the target must hold at least one slot with a loss, got only no_loss slots",
            hint=_ANSWER,
        )
    return Plan(str(instruction), source, target)


def _is(leaf: _Placed, modality: Modality) -> bool:
    return isinstance(leaf.node, Slot) and leaf.node.modality is modality


def _place(instruction: Instruction) -> Iterator[_Placed]:
    """The leaves in reading order. Groups are numbered over both sides, slots too: an unnamed one is called by that."""
    groups, slots = 0, 0

    def leaf(node: Slot | PlainText, side: Side, group: int | None) -> _Placed:
        nonlocal slots
        if isinstance(node, PlainText):
            return _Placed(node, side, group, "")
        name = str(slots) if node.name is None else node.name
        slots += 1
        return _Placed(node, side, group, name)

    sides: tuple[tuple[Side, tuple[Node, ...]], ...] = (("source", instruction.source), ("target", instruction.target))
    for side, nodes in sides:
        for node in nodes:
            if isinstance(node, Group):
                for item in node.items:
                    yield leaf(item, side, groups)
                groups += 1
            else:
                yield leaf(node, side, None)


def _check_names(instruction: Instruction, leaves: list[_Placed]) -> None:
    """An unnamed slot's number must be free, and a column is either a list (inside groups) or one value."""
    unnamed = {leaf.name for leaf in leaves if isinstance(leaf.node, Slot) and leaf.node.name is None}
    grouped: dict[str, bool] = {}
    for leaf in leaves:
        node = leaf.node
        if not isinstance(node, Slot):
            continue
        if node.name in unnamed:
            fail(
                instruction,
                node.name_span,
                f"name {node.name!r} must not be the place of an unnamed slot, got it for a named one",
                hint="name all slots",
            )
        inside = leaf.group is not None
        if grouped.setdefault(leaf.name, inside) is not inside:
            fail(
                instruction,
                node.name_span,
                f"name {leaf.name!r} must stand only inside or only outside of repeated groups, got both",
                hint="a column in a group holds a list; give the single value another name",
            )


def _check_answers(instruction: Instruction, leaves: list[_Placed], slots: list[PlanSlot]) -> None:
    """Each generated value needs a name of its own: the answers come back by name."""
    seen: set[str] = set()
    for leaf, slot in zip(leaves, slots, strict=True):
        if slot.loss and slot.name in seen and isinstance(leaf.node, Slot):
            fail(
                instruction,
                leaf.node.name_span,
                f"name {slot.name!r} must be learnt once in the target, got it a second time",
                hint="another name, or no_loss on the copy",
            )
        if slot.loss:
            seen.add(slot.name)


def _plan_slot(instruction: Instruction, leaf: _Placed, images: tuple[str, ...], image_adaptor: str | None) -> PlanSlot:
    """The slot with its loss; its generator is what its modality says, whatever stands around it."""
    node = leaf.node if isinstance(leaf.node, Slot) else Slot(Modality.TEXT)
    wanted = image_adaptor if node.modality is Modality.IMAGE else None
    typed = type_slot(instruction, node, leaf.side, wanted)
    given = dict(typed.attributes)
    loss = leaf.side == "target" and bool(leaf.name) and given.get("no_loss") is not True
    closed = given.get("closed_set") is True
    return PlanSlot(
        modality=node.modality,
        name=leaf.name,
        text=leaf.node.text if isinstance(leaf.node, PlainText) else "",
        preprocess=typed.preprocessor.name,
        adaptor=typed.adaptor.name,
        attributes=typed.attributes,
        loss=loss,
        generator=("closed_set" if closed else typed.preprocessor.generator) if loss else "",
        postprocess=typed.preprocessor.postprocess if loss else "",
        group=leaf.group,
        image=_image_of(instruction, node, images) if node.modality is Modality.BOX else "",
    )


def _image_of(instruction: Instruction, box: Slot, images: tuple[str, ...]) -> str:
    for attribute in box.attributes:
        if attribute.key == "image":
            if attribute.value not in images:
                fail(
                    instruction,
                    attribute.value_span,
                    f"attribute 'image' of BOX must name an IMAGE slot of the source, got {attribute.value!r}",
                    hint=f"image={images[0]}" if images else "add [IMAGE:img] to the source",
                )
            return str(attribute.value)
    return images[0] if images else ""


def _generators(leaves: list[_Placed], slots: list[PlanSlot]) -> Iterator[PlanSlot]:
    """Known text of the target is `forced` while nothing generated and no group stands before it, else `separator`."""
    head = True
    for leaf, slot in zip(leaves, slots, strict=True):
        if leaf.side == "source":
            yield slot
            continue
        head = head and not slot.loss and slot.group is None
        yield slot if slot.loss else replace(slot, generator="forced" if head else "separator")


def _segments(slots: list[PlanSlot], side: Side, first: int) -> tuple[PlanSegment, ...]:
    """Merges consecutive text-like slots; a group that mixes kinds stays apart from what stands around it."""
    mixed = {slot.group for slot in slots if slot.group is not None and not SPECS[slot.modality].text_like}
    segments: list[PlanSegment] = []
    for group, run in groupby(slots, key=lambda slot: slot.group if slot.group in mixed else None):
        for members in _merged(run):
            criterion = next((SPECS[s.modality].preprocessors[s.preprocess].criterion for s in members if s.loss), "")
            modality, adaptor = members[0].modality, members[0].adaptor
            segments.append(PlanSegment(first + len(segments), side, modality, adaptor, members, criterion, group))
    return tuple(segments)


def _merged(slots: Iterable[PlanSlot]) -> Iterator[tuple[PlanSlot, ...]]:
    for text_like, run in groupby(slots, key=lambda slot: SPECS[slot.modality].text_like):
        if text_like:
            yield tuple(run)
        else:
            yield from ((slot,) for slot in run)

"""A plan for the eye."""

from __future__ import annotations

from ofakern.instruction import display_width, pad
from ofakern.plan.nodes import Plan, PlanSegment, PlanSlot

__all__ = ["render"]

_HEAD = ("side", "segment", "slot", "preprocess", "adaptor", "loss", "generator", "postprocess")
_TEXT_WIDTH = 44


def render(plan: Plan) -> str:
    """The plan's slots in an aligned table, between its instruction and what it needs. No line ends in a blank."""
    rows = [_HEAD, *(row for segment in plan.segments for row in _rows(segment))]
    widths = [max(display_width(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ["  ".join(pad(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    facts = _facts(plan)
    label = max(len(name) for name, _ in facts) + 2
    return "\n".join(
        [f"{plan.instruction}", "", *lines, "", *(f"{name.ljust(label)}{value}".rstrip() for name, value in facts)]
    )


def _rows(segment: PlanSegment) -> list[tuple[str, ...]]:
    rows = []
    last_of_group = {slot.group: place for place, slot in enumerate(segment.slots)}
    first_of_group: dict[int | None, int] = {}
    for place, slot in enumerate(segment.slots):
        first = first_of_group.setdefault(slot.group, place) == place
        cell = _slot_cell(
            slot, first and slot.group is not None, slot.group is not None and last_of_group[slot.group] == place
        )
        loss = "" if segment.side == "source" else "yes" if slot.loss else "no"
        head = (segment.side, f"{segment.index} {segment.modality.name}") if place == 0 else ("", "")
        parts = (cell, slot.preprocess, slot.adaptor, loss, slot.generator, slot.postprocess)
        rows.append((*head, *(part or "-" for part in parts)))
    return rows


def _slot_cell(slot: PlanSlot, opens: bool, closes: bool) -> str:
    text = str(slot)
    if slot.plain and display_width(text) > _TEXT_WIDTH:
        kept = slot.text
        while display_width(kept) > _TEXT_WIDTH - 5:
            kept = kept[:-1]
        text = f'"{kept}..."'
    return f"{'( ' if opens else ''}{text}{' )*' if closes else ''}"


def _facts(plan: Plan) -> list[tuple[str, str]]:
    closed = [slot.name for slot in plan.target_slots if slot.flag("closed_set")]
    given = set(plan.required_columns(training=False))
    target = [name if name in given else f"{name} (optional at inference)" for name in plan.target_columns]
    facts = [
        ("criterion", plan.criterion + (f", closed set of {', '.join(closed)}" if closed else "")),
        ("generator", plan.generator),
        ("source columns", ", ".join(plan.source_columns) or "none"),
        ("target columns", ", ".join(target)),
    ]
    for slot in plan.slots:
        for key, _ in slot.attributes:
            spec = slot.attribute_spec(key)
            if spec is not None and spec.no_effect:
                facts.append(("note", f"{slot}: {key} changes nothing, {spec.no_effect}"))
    facts.extend(("cannot run yet", f"{slot}: {slot.unavailable()}") for slot in plan.slots if slot.unavailable())
    return facts

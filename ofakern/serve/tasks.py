"""What a model can be asked: its tasks with their columns, for people and for the page."""

from __future__ import annotations

from typing import Any

from ofakern.checkpoint import GeneralistModel
from ofakern.plan import Plan

__all__ = ["describe_tasks"]


def describe_tasks(model: GeneralistModel) -> dict[str, Any]:
    """`{"tasks": [{"name", "instruction", "inputs", "outputs", "answers"}], "adaptors": [...]}`."""
    tasks = []
    for name, known in sorted(model.tasks.items()):
        plan = known.plans[0]
        tasks.append(
            {
                "name": name,
                "instruction": plan.instruction,
                "inputs": _inputs(plan),
                "outputs": [_slot(slot) for slot in plan.target_slots if slot.name and slot.loss],
                "answers": {slot: len(answers) for slot, answers in known.answers.items()},
            }
        )
    return {"tasks": tasks, "adaptors": [adaptor.name for adaptor in model.config.adaptors]}


def _inputs(plan: Plan) -> list[dict[str, Any]]:
    needed = set(plan.required_columns(training=False))
    found = {slot.name: _slot(slot) for slot in plan.slots if slot.name in needed}
    return list(found.values())


def _slot(slot: Any) -> dict[str, Any]:
    return {"name": slot.name, "modality": slot.modality.name, "list": slot.group is not None}

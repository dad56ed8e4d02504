"""What a model keeps of a task it was trained on, and what it needs to follow any instruction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ofakern.data.example import build_closed_sets
from ofakern.errors import CheckpointError, OfakernValueError
from ofakern.instruction import Modality
from ofakern.plan import Plan, build_plans
from ofakern.text import ClosedSet, Tokenizer
from ofakern.text.trie import TokenSequences

__all__ = ["KnownTask", "TaskLike"]


class TaskLike(Protocol):
    """What a model reads of a task (`ofakern.Task`)."""

    name: str
    instruction: str
    files: str | Path | None
    generation: dict[str, Any]
    micro_batch_size: int

    def prepared(self, row: Mapping[str, Any]) -> Mapping[str, Any]: ...

    def closed_answers(self) -> Mapping[str, Sequence[str]]: ...

    def texts(self) -> Iterable[str]: ...

    def phones(self) -> Iterable[str]: ...

    def motions(self) -> Iterable[Any]: ...


@dataclass(frozen=True)
class KnownTask:
    """An instruction's plans with the answers of its closed sets.

    Attributes:
        plans: one for each alternative; inference follows the first.
        answers: slot name -> answers, of slots with a closed set.
        generation: settings for `GenerationConfig.replace`.
        encoded: slot name -> tokens of its answers, where a file had them.
    """

    instruction: str
    plans: tuple[Plan, ...]
    answers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    encoded: Mapping[str, TokenSequences] = field(default_factory=dict, compare=False, repr=False)
    _made: tuple[Tokenizer, dict[str, ClosedSet]] | None = field(default=None, init=False, compare=False, repr=False)

    @classmethod
    def from_task(cls, task: TaskLike, image_adaptor: str | None) -> KnownTask:
        """Plan a task's instruction and collect its answers."""
        plans = build_plans(task.instruction, default_image_adaptor=image_adaptor)
        answers = {name: tuple(values) for name, values in task.closed_answers().items()}
        return cls(task.instruction, plans, answers, dict(task.generation))

    def with_answers(self, closed_set: Iterable[str]) -> KnownTask:
        """The same with other answers: for the slots with `closed_set`, or else for the last generated text slot."""
        slots = [s for s in self.plans[0].target_slots if s.loss and s.modality is Modality.TEXT]
        if not slots:
            raise OfakernValueError(f"inference: closed_set must belong to a TEXT slot, got {self.instruction!r}")
        chosen = [slot for slot in slots if slot.flag("closed_set")] or slots[-1:]
        answers = tuple(map(str, closed_set))
        return KnownTask(
            self.instruction, self.plans, {**self.answers, **{s.name: answers for s in chosen}}, self.generation
        )

    def closed_sets(self, tokenizer: Tokenizer) -> dict[str, ClosedSet]:
        """The closed set of every slot that has answers; made once for a tokenizer."""
        if self._made is None or self._made[0] is not tokenizer:
            object.__setattr__(self, "_made", (tokenizer, self._closed_sets(tokenizer)))
        assert self._made is not None
        return dict(self._made[1])

    def _closed_sets(self, tokenizer: Tokenizer) -> dict[str, ClosedSet]:
        known = {name: ClosedSet.encoded(self.answers[name], tokens) for name, tokens in self.encoded.items()}
        found = build_closed_sets(self.plans, self.answers, tokenizer, known)
        rest = (name for name in self.answers if name not in found)
        return found | {name: known.get(name) or ClosedSet(self.answers[name], tokenizer) for name in rest}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for plans.json."""
        return {
            "instruction": self.instruction,
            "plans": [plan.to_dict() for plan in self.plans],
            "closed_sets": {name: list(values) for name, values in self.answers.items()},
            "generation": dict(self.generation),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KnownTask:
        """The inverse of `to_dict`; CheckpointError for other data."""
        try:
            plans = tuple(Plan.from_dict(plan) for plan in data["plans"])
            answers = {name: tuple(values) for name, values in data["closed_sets"].items()}
            return cls(data["instruction"], plans, answers, dict(data["generation"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"from_pretrained: plans.json must hold whole tasks, got: {error!r}") from error

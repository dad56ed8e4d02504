"""A task: a name, one line of instruction, data sets, and how its answers are judged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ofakern.data.readers import Columns, Rows, open_rows
from ofakern.errors import DataError, OfakernTypeError, OfakernValueError
from ofakern.instruction import Instruction, Modality, Slot, parse
from ofakern.instruction.nodes import Group, Node
from ofakern.metrics import accuracy, grounding_scores, token_f1, vqa_score, wer
from ofakern.modality.struct.preprocess import table_text

SPLITS = ("train", "valid", "test")

Metric = Callable[[Sequence[Any], Sequence[Any]], "float | Mapping[str, float]"]
"""(predictions, references) -> a number, or several by name."""

METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "token_f1": token_f1,
    "vqa_score": vqa_score,
    "grounding": grounding_scores,
    "wer": wer,
}

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_TEXT_ROWS = 10_000


class Task:
    """One line of instruction and the data it is trained and judged on.

    Args:
        name: letters, digits, `_`, `.`, `-`; it stands in logs, checkpoints and `model.inference(name, ...)`.
        instruction: `[IMAGE:img] what does the image describe? -> [TEXT:cap]`; several alternatives are joined with
            `|||` or given as a list: training draws one per sample, evaluation takes the first.
        micro_batch_size: samples per forward pass. update_freq: forward passes per update.
        weight: factor of the task's loss in the mixture.
        closed_set: the answers of `closed_set` slots: a list, a mapping answer -> label, or the name of the column
            whose training values they are. None: the slot's own column.
        target_field: the column with the reference (or several); None: that of the last target slot.
        metrics: by name (`accuracy`, `token_f1`, `vqa_score`, `grounding`, `wer`) or any
            (predictions, references) -> number.
        preprocess: row -> row before anything else; None drops the row as broken.
        files: folder or .zip archive in which file names of the rows are looked up.
        generation: settings for evaluation, as in `GenerationConfig`.
        label_smoothing: instead of the run's.
        texts: what a vocabulary is trained on; None: the text columns of the first 10,000 training rows.

    Raises:
        InstructionError: the instruction cannot be read. OfakernValueError, OfakernTypeError: other arguments.
    """

    def __init__(
        self,
        name: str,
        instruction: str | Sequence[str],
        *,
        micro_batch_size: int = 8,
        update_freq: int = 1,
        weight: float = 1.0,
        closed_set: Sequence[str] | Mapping[str, Any] | str | None = None,
        target_field: str | None = None,
        metrics: Sequence[str] | Mapping[str, Metric] = (),
        preprocess: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] | None = None,
        files: str | Path | None = None,
        generation: Mapping[str, Any] | None = None,
        label_smoothing: float | None = None,
        texts: Iterable[str] | None = None,
    ) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise OfakernValueError(f"Task: name must consist of letters, digits, '_', '.' and '-', got {name!r}")
        for field, value in (("micro_batch_size", micro_batch_size), ("update_freq", update_freq)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OfakernValueError(f"Task {name}: {field} must be an integer of at least 1, got {value!r}")
        if not weight >= 0:
            raise OfakernValueError(f"Task {name}: weight must not be negative, got {weight!r}")
        self.name = name
        self.instruction = instruction if isinstance(instruction, str) else " ||| ".join(instruction)
        self.alternatives: tuple[Instruction, ...] = parse(self.instruction)
        self.micro_batch_size = micro_batch_size
        self.update_freq = update_freq
        self.weight = weight
        self.label_smoothing = label_smoothing
        self.preprocess = preprocess
        self.files = files
        self.generation = dict(generation or {})
        self.metrics = _metrics(name, metrics)
        self._closed_set = closed_set
        self._texts = texts
        self._target_field = target_field
        self._rows: dict[str, Rows] = {}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split}={len(rows)}" for split, rows in self._rows.items())
        return f"Task({self.name!r}, {self.instruction!r}{', ' + sizes if sizes else ''})"

    def add_dataset(
        self,
        data: str | Path | Rows | Iterable[Mapping[str, Any]],
        split: str = "train",
        *,
        columns: Columns = None,
        header: bool | None = None,
    ) -> Task:
        """Set the rows of a split ("train", "valid", "test"): a file, a Hugging Face dataset, any rows. Returns self.

        columns, header: as in `ofakern.data.open_rows`. A second call for the same split appends.
        Raises OfakernValueError for another split, DataError for what cannot be read.
        """
        if split not in SPLITS:
            raise OfakernValueError(f"Task {self.name}: split must be one of {', '.join(SPLITS)}, got {split!r}")
        rows = open_rows(data, columns=columns, header=header)
        known = self._rows.get(split)
        self._rows[split] = rows if known is None else _Joined((known, rows))
        return self

    def rows(self, split: str) -> Rows | None:
        """The rows of a split as they were given; None when there are none."""
        return self._rows.get(split)

    def prepared(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row after `preprocess`; DataError when that drops it."""
        if self.preprocess is None:
            return row
        changed = self.preprocess(row)
        if changed is None:
            raise DataError(f"{self.name}: row must be kept by preprocess, got None")
        return changed

    @property
    def target_slots(self) -> tuple[Slot, ...]:
        """The target slots of the first alternative, in order."""
        return tuple(_slots(self.alternatives[0].target))

    @property
    def target_field(self) -> str:
        """The column with the reference."""
        if self._target_field is not None:
            return self._target_field
        named = [slot.name for slot in self.target_slots if slot.name is not None]
        if not named:
            raise OfakernValueError(f"Task {self.name}: target_field must be given where no target slot has a name")
        return named[-1]

    def closed_answers(self) -> dict[str, tuple[str, ...]]:
        """The answers of every target slot with the attribute `closed_set`, by the slot's name.

        Raises DataError when they are to come from a column and there are no training rows.
        """
        found: dict[str, tuple[str, ...]] = {}
        for alternative in self.alternatives:
            for slot in _slots(alternative.target):
                if slot.name is not None and any(a.key == "closed_set" for a in slot.attributes):
                    if slot.name not in found:
                        found[slot.name] = self._answers(slot.name)
        return found

    def _answers(self, slot: str) -> tuple[str, ...]:
        given = self._closed_set
        if given is not None and not isinstance(given, str):
            return tuple(dict.fromkeys(map(str, given)))
        column = slot if given is None else given
        rows = self._rows.get("train")
        if rows is None:
            raise DataError(
                f"{self.name}: closed_set must be given where there are no training rows, got none for slot {slot!r}"
                '\nTry: Task(..., closed_set=["yes", "no"])'
            )
        values = (self.prepared(rows[i]).get(column) for i in range(len(rows)))
        answers = dict.fromkeys(str(value) for value in values if value is not None)
        if not answers:
            raise DataError(f"{self.name}: training rows must have the column {column!r} with the answers, got none")
        return tuple(sorted(answers))

    def texts(self) -> Iterable[str]:
        """All text a vocabulary is trained on: plain text, answers, and the text columns of the training rows."""
        for alternative in self.alternatives:
            yield from _plain_texts((*alternative.source, *alternative.target))
        for answers in self.closed_answers().values():
            yield from answers
        yield from self._row_texts() if self._texts is None else self._texts

    def phones(self) -> Iterable[str]:
        """The names in the PHONE columns of the first 10,000 training rows."""
        for value in self._values(Modality.PHONE):
            yield from value.split() if isinstance(value, str) else map(str, value)

    def motions(self) -> Iterable[Any]:
        """What the MOTION columns of the first 10,000 training rows hold."""
        yield from self._values(Modality.MOTION)

    def _row_texts(self) -> Iterable[str]:
        for value in self._values(Modality.TEXT):
            yield from (str(v) for v in (value if isinstance(value, (list, tuple)) else [value]) if v is not None)
        for table in self._values(Modality.STRUCT):
            with suppress(DataError):  # counted and reported when the row is drawn for training
                yield table_text(table)

    def _values(self, modality: Modality) -> Iterable[Any]:
        """What the columns of a modality hold in the first training rows."""
        names = {
            slot.name
            for alternative in self.alternatives
            for slot in alternative.slots
            if slot.modality is modality and slot.name is not None
        }
        rows = self._rows.get("train")
        if rows is None or not names:
            return
        for i in range(min(len(rows), _TEXT_ROWS)):
            try:
                row = self.prepared(rows[i])
            except (DataError, OSError):
                continue  # counted and reported when the row is drawn for training
            yield from (row[name] for name in sorted(names) if row.get(name) is not None)


class _Joined:
    """Rows of several sources, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def _metrics(name: str, metrics: Sequence[str] | Mapping[str, Metric]) -> dict[str, Metric]:
    if isinstance(metrics, str):
        metrics = (metrics,)
    if isinstance(metrics, Mapping):
        for key, value in metrics.items():
            if not callable(value):
                raise OfakernTypeError(f"Task {name}: metrics must be callable, got {value!r} for {key!r}")
        return dict(metrics)
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise OfakernValueError(f"Task {name}: metrics must be among {', '.join(METRICS)}, got {unknown[0]!r}")
    return {metric: METRICS[metric] for metric in metrics}


def _slots(nodes: Sequence[Node]) -> Iterable[Slot]:
    for node in nodes:
        if isinstance(node, Slot):
            yield node
        elif isinstance(node, Group):
            yield from (item for item in node.items if isinstance(item, Slot))


def _plain_texts(nodes: Sequence[Node]) -> Iterable[str]:
    for node in nodes:
        if isinstance(node, Group):
            yield from _plain_texts(node.items)
        elif not isinstance(node, Slot):
            yield node.text

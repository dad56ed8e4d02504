"""What a model keeps of the instructions it has followed: their closed sets, encoders and automata are built once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ofakern.checkpoint.answers import TargetReader
from ofakern.checkpoint.image_tokenizer import IMAGE_CODES, codes_of
from ofakern.checkpoint.known_task import KnownTask
from ofakern.checkpoint.requests import Recipe
from ofakern.data.example import Encoder, PreprocessConfig
from ofakern.data.readers import open_files
from ofakern.instruction import Modality
from ofakern.modality.image.vqgan import VQGAN
from ofakern.model import OFAConfig
from ofakern.text import Tokenizer

__all__ = ["Recipes"]

_KEPT = 64


class _Model(Protocol):
    """What a recipe is made of."""

    config: OFAConfig
    preprocess: PreprocessConfig
    image_tokenizer: VQGAN | None

    @property
    def tokenizer(self) -> Tokenizer: ...


@dataclass(frozen=True)
class _Entry:
    recipe: Recipe
    made_of: tuple[Any, ...]


class Recipes:
    """The recipes used last, by name, closed set and files; safe to ask from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()

    def get(
        self, model: _Model, name: str, known: KnownTask, closed_set: tuple[str, ...] | None, files: str | Path | None
    ) -> Recipe:
        """The recipe of a task or instruction. A model whose parts have been replaced gets a new one.

        files: folder or archive of file names. Raises DataError when there is none.
        """
        key = name, closed_set, None if files is None else str(files)
        # An instruction that no task has is planned anew every time, to the same plans.
        made_of = known.plans, known.answers, model.tokenizer, model.preprocess, model.image_tokenizer, model.config
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not _same(entry.made_of, made_of):
                chosen = known if closed_set is None else known.with_answers(closed_set)
                entry = _Entry(_recipe(model, chosen, files), made_of)
                self._entries[key] = entry
            self._entries.move_to_end(key)
            while len(self._entries) > _KEPT:
                self._entries.popitem(last=False)
            return entry.recipe


def _same(old: tuple[Any, ...], new: tuple[Any, ...]) -> bool:
    return old[:2] == new[:2] and all(a is b for a, b in zip(old[2:], new[2:], strict=True))


def _recipe(model: _Model, known: KnownTask, files: str | Path | None) -> Recipe:
    plan, closed_sets = known.plans[0], known.closed_sets(model.tokenizer)
    encoder = Encoder(
        plan, model.tokenizer, model.preprocess, split="test", closed_sets=closed_sets, files=open_files(files)
    )
    codes = codes_of(model.config)
    reader = TargetReader(plan, model.tokenizer, closed_sets, encoder.coder, model.image_tokenizer, codes)
    # Answers that rows may bring along are not looked at, unless the source shows them anyway.
    hidden = {slot.name for slot in plan.target_slots if slot.loss} - set(plan.source_columns)
    searched = plan.target[0].modality not in (Modality.AUDIO, Modality.MOTION)
    automaton = reader.automaton({}) if searched and not reader.per_sample else None
    positions = codes + 1 if plan.target[0].adaptor == IMAGE_CODES else model.preprocess.max_target_length
    return Recipe(known, encoder, reader, frozenset(hidden), automaton, positions)

"""Generated tokens back to values: which tokens belong to which target slot, and what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ofakern.data.example import IMAGE_SIZES, IMAGES, PreprocessConfig
from ofakern.errors import DataError
from ofakern.instruction import Modality
from ofakern.modality.box.postprocess import decode_box
from ofakern.modality.output import Output
from ofakern.modality.text.postprocess import decode_text
from ofakern.modality.text.preprocess import encode_text
from ofakern.plan import Plan, PlanSlot
from ofakern.text import ClosedSet, Tokenizer

__all__ = ["AnswerReader"]


class AnswerReader:
    """Tokens of an answer to an Output: `reader(tokens, columns, prefix_length=..., score=...)`.

    closed_sets: by slot name; an answer of a closed set comes back as it was given. `columns` are the Example's: the
    row's values with `IMAGE_SIZES` (boxes need them) and `IMAGES`.
    """

    def __init__(
        self,
        plan: Plan,
        tokenizer: Tokenizer,
        config: PreprocessConfig | None = None,
        closed_sets: Mapping[str, ClosedSet] | None = None,
    ) -> None:
        self.plan = plan
        self.tokenizer = tokenizer
        self.closed_sets = dict(closed_sets or {})
        vocabulary = tokenizer.vocabulary
        self._bins = vocabulary.range("bin")
        has_box = any(slot.modality is Modality.BOX for slot in plan.target_slots)
        self._coder = (config or PreprocessConfig()).box_coder(vocabulary) if has_box else None
        self._runs = [
            (group, tuple(slot for slot in slots if slot.generator != "forced"))
            for segment in plan.target
            for group, slots in segment.runs()
        ]
        self._runs = [(group, slots) for group, slots in self._runs if slots]

    def __call__(
        self,
        tokens: Sequence[int],
        columns: Mapping[str, Any] | None = None,
        *,
        prefix_length: int = 0,
        score: float | None = None,
    ) -> Output:
        """The Output of one answer.

        tokens: without the begin token, with the forced prefix of `prefix_length` tokens; what follows an end token is
        ignored. Raises DataError when a box has no image size in `columns`.
        """
        columns = {} if columns is None else columns
        output = Output(score=score, tokens=[int(t) for t in tokens])
        ids = output.tokens[prefix_length:]
        if self.tokenizer.vocabulary.eos in ids:
            ids = ids[: ids.index(self.tokenizer.vocabulary.eos)]
        texts: list[str] = []
        for slot, item, part in self._parts(ids, columns):
            if not slot.loss:
                continue
            value: Any
            if slot.modality is Modality.BOX:
                value = self._box(slot, part, columns)
                output.boxes += [] if value is None else [value]
            else:
                value = decode_text(part, self.tokenizer, self.closed_sets.get(slot.name))
                texts.append(value)
            if item is None:
                output.values[slot.name] = value
            else:
                output.values.setdefault(slot.name, []).append(value)
        output.text = " ".join(text for text in texts if text) if texts else None
        output.box = output.boxes[0] if output.boxes else None
        output.image = self._image(columns)
        return output

    # ------------------------------------------------------------------------------------------------- tokens apart

    def _parts(
        self, ids: Sequence[int], columns: Mapping[str, Any]
    ) -> Iterable[tuple[PlanSlot, int | None, Sequence[int]]]:
        """(slot, its place in a repeated group, its tokens) in order."""
        place = 0
        for number, (group, slots) in enumerate(self._runs):
            after = [self._runs[number + 1][1][0]] if number + 1 < len(self._runs) else []
            item = 0
            while True:
                begin = place
                for k, slot in enumerate(slots):
                    again = [] if group is None else [slots[0]]
                    followers = [slots[k + 1]] if k + 1 < len(slots) else [*again, *after]
                    end = self._end(slot, ids, place, followers, columns, item)
                    yield slot, None if group is None else item, ids[place:end]
                    place = end
                item += 1
                ended = group is None or place == begin or place == len(ids)
                if ended or any(self._starts(slot, ids, place, columns, 0) for slot in after):
                    break

    def _end(
        self,
        slot: PlanSlot,
        ids: Sequence[int],
        begin: int,
        followers: Sequence[PlanSlot],
        columns: Mapping[str, Any],
        item: int,
    ) -> int:
        """Where the tokens of `slot` end that begin at `begin`."""
        if not slot.loss:
            known = self._known(slot, columns, item)
            return begin + len(known) if list(ids[begin : begin + len(known)]) == known else begin
        if slot.modality is Modality.BOX:
            return min(begin + 4, len(ids))
        closed = self.closed_sets.get(slot.name)
        if closed is not None:
            for end in range(len(ids), begin, -1):
                if ids[begin:end] in closed:
                    return end
        for end in range(begin, len(ids)):
            if any(self._starts(follower, ids, end, columns, item) for follower in followers):
                return end
        return len(ids)

    def _starts(self, slot: PlanSlot, ids: Sequence[int], place: int, columns: Mapping[str, Any], item: int) -> bool:
        """Whether `slot` certainly begins at `place`; free text never does."""
        if not slot.loss:
            known = self._known(slot, columns, item)
            return bool(known) and list(ids[place : place + len(known)]) == known
        if slot.modality is Modality.BOX:
            return place < len(ids) and ids[place] in self._bins
        closed = self.closed_sets.get(slot.name)
        return closed is not None and any(ids[place:end] in closed for end in range(place + 1, len(ids) + 1))

    def _known(self, slot: PlanSlot, columns: Mapping[str, Any], item: int) -> list[int]:
        """Tokens of text that the target is given in its midst: the instruction's own, or a no_loss column's."""
        if slot.plain:
            return self.tokenizer.encode(slot.text)
        value = columns.get(slot.name)
        if slot.group is not None and isinstance(value, (list, tuple)):
            value = value[item] if item < len(value) else None
        if value is None or slot.modality is Modality.BOX:
            return []
        return encode_text(
            value,
            self.tokenizer,
            uncased=slot.flag("uncased"),
            no_punctuation=slot.flag("no_punctuation"),
            max_length=_whole(slot.attribute("max_length")),
        )

    # ------------------------------------------------------------------------------------------------------- values

    def _box(self, slot: PlanSlot, ids: Sequence[int], columns: Mapping[str, Any]) -> Any:
        size = columns.get(IMAGE_SIZES, {}).get(slot.image)
        if size is None or self._coder is None:
            raise DataError(f"AnswerReader: columns must hold the size of image {slot.image!r}, got none")
        return decode_box(ids, self.tokenizer.vocabulary, self._coder, size)

    def _image(self, columns: Mapping[str, Any]) -> Any:
        images = columns.get(IMAGES, {})
        names = [slot.image for slot in self.plan.target_slots if slot.image] + list(images)
        return next((images[name] for name in names if name in images), None)


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, (int, float)) else None

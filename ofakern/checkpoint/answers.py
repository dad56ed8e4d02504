"""From a plan's target to what may be generated, and from generated tokens back to the slots' values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from PIL import Image

from ofakern.data.example import IMAGE_SIZES, IMAGES
from ofakern.errors import OfakernRuntimeError
from ofakern.generate import (
    ChoiceTokens,
    FixedTokens,
    FreeTokens,
    GenerationConfig,
    Hypothesis,
    RangeTokens,
    RepeatTokens,
    TargetElement,
    TokenAutomaton,
    compile_target,
)
from ofakern.instruction import Modality
from ofakern.modality.box.postprocess import decode_box
from ofakern.modality.box.preprocess import BoxCoder
from ofakern.modality.image.tokens import picture_of
from ofakern.modality.image.vqgan import VQGAN
from ofakern.modality.output import Output
from ofakern.modality.phone.preprocess import encode_phones, phone_ids, phone_names
from ofakern.modality.text.postprocess import decode_text
from ofakern.plan import Plan, PlanSlot
from ofakern.text import ClosedSet, Tokenizer

__all__ = ["TargetReader"]

_BOX_TOKENS = 4


class TargetReader:
    """The target of one plan: its automaton, and its answers as `Output`s.

    Slots at the head whose text is known are the forced prefix and no part of it. A `no_loss` slot between generated
    ones is known text of each sample (`per_sample`), so its automaton is too.
    """

    def __init__(
        self,
        plan: Plan,
        tokenizer: Tokenizer,
        closed_sets: Mapping[str, ClosedSet],
        coder: BoxCoder | None,
        image_tokenizer: VQGAN | None = None,
        codes_per_image: int = 0,
    ) -> None:
        self._plan, self._tokenizer, self._closed_sets, self._coder = plan, tokenizer, closed_sets, coder
        self._slots = [slot for slot in plan.target_slots if slot.generator != "forced"]
        self.per_sample = any(slot.generator == "separator" and not slot.plain for slot in self._slots)
        self._bins = tokenizer.vocabulary.range("bin")
        self._text = tokenizer.vocabulary.range("text")
        self._codes = tokenizer.vocabulary.range("code")
        self._image_tokenizer, self._codes_per_image = image_tokenizer, codes_per_image

    # ------------------------------------------------------------------------------------------------- the search

    def automaton(self, row: Mapping[str, Any]) -> TokenAutomaton:
        """What the target may look like; `row` is read for known text in the middle only."""
        elements: list[TargetElement] = []
        for group, slots in groupby(self._slots, key=lambda slot: slot.group):
            parts = [self._element(slot, row) for slot in slots]
            elements += parts if group is None else [RepeatTokens(tuple(parts))]
        vocabulary = self._tokenizer.vocabulary
        return compile_target(elements, eos=vocabulary.eos, vocabulary_size=len(vocabulary))

    @property
    def codes_only(self) -> bool:
        """Whether the target is an image's codes."""
        return self._slots[-1].modality is Modality.IMAGE

    def as_ofasys(self, config: GenerationConfig) -> tuple[GenerationConfig, bool]:
        """OFASys's way: a box is any four tokens, text any tokens; the flag says whether the automaton is used."""
        if any(slot.name in self._closed_sets or slot.modality is Modality.IMAGE for slot in self._slots):
            return config, True
        if self._slots[-1].modality is Modality.BOX:
            return config.replace(max_new_tokens=_BOX_TOKENS, min_new_tokens=_BOX_TOKENS), False
        return config, False

    def _element(self, slot: PlanSlot, row: Mapping[str, Any]) -> TargetElement:
        if slot.name in self._closed_sets:
            return ChoiceTokens(self._closed_sets[slot.name].sequences)
        if slot.generator == "separator":
            return FixedTokens(tuple(self._known(slot, row)))
        if slot.modality is Modality.BOX:
            return RangeTokens(self._bins.start, self._bins.stop, _BOX_TOKENS)
        if slot.modality is Modality.TEXT:
            return FreeTokens(self._text.start, self._text.stop)
        if slot.modality is Modality.IMAGE:
            count = int(slot.attribute("length") or self._codes_per_image)
            return RangeTokens(self._codes.start, self._codes.stop, count, renormalise=True)
        if slot.modality is Modality.PHONE:
            phones = phone_ids(self._tokenizer.vocabulary)
            return FreeTokens(phones.start, phones.stop)
        raise OfakernRuntimeError(f"inference: target slot must be TEXT, BOX, PHONE or IMAGE here, got {slot}")

    def _known(self, slot: PlanSlot, row: Mapping[str, Any]) -> list[int]:
        if slot.plain:
            return self._tokenizer.encode(slot.text)
        if slot.modality is Modality.PHONE and slot.group is None:
            return encode_phones(row[slot.name], self._tokenizer.vocabulary)
        if slot.modality is not Modality.TEXT or slot.group is not None:
            raise OfakernRuntimeError(f"inference: known text inside a target must be a TEXT slot, got {slot}")
        return self._tokenizer.encode(str(row[slot.name]))

    # ------------------------------------------------------------------------------------------------ the answers

    def read(self, answer: Hypothesis, prefix: int, automaton: TokenAutomaton, columns: Mapping[str, Any]) -> Output:
        """The values of one answer; `prefix` forced tokens stand before them, `columns` are the Example's."""
        eos = self._tokenizer.vocabulary.eos
        tokens = [token for token in answer.tokens[prefix:] if token != eos]
        output = Output(score=answer.score, tokens=list(answer.tokens), token_log_probs=list(answer.token_scores))
        for number, part in self._parts(tokens, automaton):
            slot = self._slots[number]
            if slot.loss:
                self._add(output, slot, part, columns)
        self._finish(output, columns)
        return output

    def partial(self, tokens: Sequence[int], automaton: TokenAutomaton) -> tuple[str | None, str]:
        """Name and text so far of the slot that the last of `tokens` (without the forced prefix) belongs to.

        None and "" at the end and between slots; "" for a slot without text. A closed set's answer is as its tokens
        spell it.
        """
        if tokens[-1] == self._tokenizer.vocabulary.eos:
            return None, ""
        number, part = 0, tokens
        if len(self._slots) > 1 or self._slots[0].group is not None:
            numbers = automaton.trace(tokens)
            number = numbers[-1]
            begin = next((i for i in reversed(range(len(numbers))) if numbers[i] != number), -1) + 1
            part = tokens[begin:]
        slot = self._slots[number] if number >= 0 else None
        if slot is None or not slot.loss:
            return None, ""
        if slot.modality is Modality.PHONE:
            return slot.name, phone_names(part, self._tokenizer.vocabulary)
        return slot.name, decode_text(part, self._tokenizer) if slot.modality is Modality.TEXT else ""

    def _parts(self, tokens: Sequence[int], automaton: TokenAutomaton) -> list[tuple[int, list[int]]]:
        """(slot, its tokens) in order; a box stands four tokens at a time."""
        if len(self._slots) == 1 and self._slots[0].group is None:
            return [(0, list(tokens))]
        found: list[tuple[int, list[int]]] = []
        for number, run in groupby(zip(automaton.trace(tokens), tokens, strict=True), key=lambda pair: pair[0]):
            part = [token for _, token in run]
            if number < 0:
                continue  # cut off by the length limit
            step = _BOX_TOKENS if self._slots[number].modality is Modality.BOX else len(part)
            found += [(number, part[i : i + step]) for i in range(0, len(part), step)]
        return found

    def _add(self, output: Output, slot: PlanSlot, tokens: list[int], columns: Mapping[str, Any]) -> None:
        value: Any
        if slot.modality is Modality.BOX:
            value = self._box(slot, tokens, columns)
            if value is not None:
                output.boxes.append(value)
        elif slot.modality is Modality.IMAGE:
            value = output.image = self._picture(tokens)
        elif slot.modality is Modality.PHONE:
            value = phone_names(tokens, self._tokenizer.vocabulary)
        else:
            value = decode_text(tokens, self._tokenizer, self._closed_sets.get(slot.name))
        if slot.group is None:
            output.values[slot.name] = value
        else:
            output.values.setdefault(slot.name, []).append(value)

    def _box(self, slot: PlanSlot, tokens: list[int], columns: Mapping[str, Any]) -> Any:
        if self._coder is None:
            return None
        return decode_box(tokens, self._tokenizer.vocabulary, self._coder, columns[IMAGE_SIZES][slot.image])

    def _picture(self, tokens: list[int]) -> Image.Image | None:
        """None without a tokenizer, and for codes that fill no whole grid."""
        if self._image_tokenizer is None or len(tokens) != self._codes_per_image:
            return None
        return picture_of([token - self._codes.start for token in tokens], self._image_tokenizer)

    def _finish(self, output: Output, columns: Mapping[str, Any]) -> None:
        output.box = output.boxes[0] if output.boxes else None
        texts = [slot.name for slot in self._slots if slot.loss and slot.modality not in (Modality.BOX, Modality.IMAGE)]
        if texts:
            value = output.values.get(texts[-1], "")
            output.text = " ".join(value) if isinstance(value, list) else value
        if any(slot.modality is Modality.IMAGE for slot in self._slots):
            return  # the picture that was made is the image
        images: Mapping[str, Image.Image] = columns.get(IMAGES, {})
        named = next((slot.image for slot in self._slots if slot.image in images), next(iter(images), None))
        output.image = None if named is None else images[named]

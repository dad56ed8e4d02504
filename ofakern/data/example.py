"""A row and a plan to an Example: the tokens, pixels and labels of one sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ofakern.data.batch import IGNORE_LABEL, Example, Segment
from ofakern.errors import DataError, OfakernValueError
from ofakern.instruction import Modality
from ofakern.modality.audio.adaptor import MEL_BINS, tokens_of
from ofakern.modality.audio.preprocess import AudioTransform
from ofakern.modality.box.preprocess import BoxCoder, parse_box
from ofakern.modality.image.preprocess import MAX_PIXELS, FileSource, ImageTransform, load_image
from ofakern.modality.image.tokens import image_codes
from ofakern.modality.image.vqgan import VQGAN
from ofakern.modality.motion.preprocess import MotionClip, MotionSettings, encode_motion, load_motion
from ofakern.modality.phone.preprocess import encode_phones, mask_phones
from ofakern.modality.registry import SPECS
from ofakern.modality.struct.preprocess import check_column_kinds, table_text
from ofakern.modality.text.preprocess import corrupt, encode_text
from ofakern.modality.video.preprocess import VideoTransform, load_frames
from ofakern.plan import Plan, PlanSegment, PlanSlot
from ofakern.text import ClosedSet, Tokenizer, Vocabulary

__all__ = ["IMAGES", "IMAGE_SIZES", "ROW_NUMBER", "Encoder", "PreprocessConfig", "build_closed_sets", "unprompted"]

Split = Literal["train", "valid", "test"]

# Keys of Example.columns that are ours; no column of an instruction can be called so.
IMAGES = "<images>"
IMAGE_SIZES = "<image sizes>"
ROW_NUMBER = "<row>"

_ALONE = "AUDIO, MOTION or IMAGE"  # targets that stand alone


@dataclass(frozen=True)
class PreprocessConfig:
    """What preprocessing depends on beside the plan and the vocabulary; saved with a model.

    image_size: side S of the square images (pixels). box_image_size: pixels the last bin stands for; None: S (OFA's
    checkpoints: 512, whatever S). max_source_length, max_target_length: tokens of one text group, begin and end
    included. image_tokens: tokens an image takes, by adaptor; `image_resnet` needs no entry. max_pixels: largest
    image read. audio_rate, speech_rate: samples a second of sound that is heard and of speech that is written;
    audio_tokens: most tokens of heard sound and most steps of written speech; frames_per_step: frames that make one
    step; speech_mean, speech_std: per mel bin, taken out of the frames that are learnt and put back into written ones
    (`speech_statistics` finds them; empty: neither). video_size, video_frames: side of the square frames (pixels) and
    how many are taken of a video. motion: what all motions share.
    """

    image_size: int = 480
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    box_image_size: int | None = None
    max_source_length: int = 1024
    max_target_length: int = 1024
    image_tokens: Mapping[str, int] = field(default_factory=dict)
    max_pixels: int = MAX_PIXELS
    audio_rate: int = 16_000
    speech_rate: int = 16_000
    audio_tokens: int = 1024
    frames_per_step: int = 1
    speech_mean: tuple[float, ...] = ()
    speech_std: tuple[float, ...] = ()
    video_size: int = 256
    video_frames: int = 16
    motion: MotionSettings = field(default_factory=MotionSettings)

    def __post_init__(self) -> None:
        if isinstance(self.motion, Mapping):  # as JSON gives it
            object.__setattr__(self, "motion", MotionSettings(**self.motion))
        if self.video_size < 1 or self.video_frames < 1:
            raise OfakernValueError(
                f"PreprocessConfig: video_size and video_frames must be at least 1, "
                f"got {self.video_size} and {self.video_frames}"
            )
        if self.audio_rate < 100 or self.speech_rate < 16_000:  # written speech has bins up to 8 kHz
            raise OfakernValueError(
                "PreprocessConfig: audio_rate must be at least 100 and speech_rate at least 16000 samples a second, "
                f"got {self.audio_rate} and {self.speech_rate}"
            )
        if len(self.speech_mean) != len(self.speech_std) or len(self.speech_mean) not in (0, MEL_BINS):
            raise OfakernValueError(
                f"PreprocessConfig: speech_mean and speech_std must both have {MEL_BINS} values or none, "
                f"got {len(self.speech_mean)} and {len(self.speech_std)}"
            )

    @property
    def audio(self) -> AudioTransform:
        """What becomes of sound."""
        return AudioTransform(
            self.audio_rate,
            self.speech_rate,
            self.frames_per_step,
            self.audio_tokens,
            self.speech_mean,
            self.speech_std,
        )

    @property
    def video(self) -> VideoTransform:
        """What becomes of videos."""
        return VideoTransform(self.video_size, self.video_frames)

    def box_coder(self, vocabulary: Vocabulary) -> BoxCoder:
        """The box quantisation. Raises DataError when the vocabulary has fewer than two bins."""
        return BoxCoder(self.image_size, len(vocabulary.range("bin")), self.box_image_size or self.image_size)


def build_closed_sets(
    plans: Plan | Sequence[Plan],
    answers: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer,
    known: Mapping[str, ClosedSet] | None = None,
) -> dict[str, ClosedSet]:
    """The closed set of every `closed_set` slot of the plans, by the slot's name; answers are normalised as the slot
    says. known: sets that need not be made again.

    Raises OfakernValueError when a slot has no answers.
    """
    found: dict[str, ClosedSet] = {}
    for plan in [plans] if isinstance(plans, Plan) else plans:
        for slot in plan.target_slots:
            if not slot.flag("closed_set") or slot.name in found:
                continue
            if slot.name not in answers:
                raise OfakernValueError(f"build_closed_sets: answers must be given for slot {slot}, got none")
            made = (known or {}).get(slot.name)
            found[slot.name] = made or ClosedSet(answers[slot.name], tokenizer, **_text_options(slot))
    return found


@dataclass
class _Tokens:
    """Target tokens in step: the clean token, what the decoder is given, its slot, its loss, what it could be."""

    clean: list[int] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    loss: list[bool] = field(default_factory=list)
    allowed: list[Tensor] = field(default_factory=list)

    def add(self, clean: Sequence[int], inputs: Sequence[int], slot: int, loss: bool, allowed: list[Tensor]) -> None:
        self.clean += clean
        self.inputs += inputs
        self.slots += [slot] * len(clean)
        self.loss += [loss] * len(clean)
        self.allowed += allowed


_ANY = torch.empty(0, dtype=torch.int64)


class Encoder:
    """Rows of one instruction to Examples: `encoder(row, row_number, rng)`.

    plans: the instruction's alternatives; training draws one per sample, the other splits take the first.
    split: "train" (noise, random alternative), "valid" (neither) or "test" (a missing target is to be generated).
    closed_sets: by slot name (`build_closed_sets`). files: where file names are looked up. prepare: row -> row before
    anything else. image_tokenizer: turns the images of IMAGE targets into codes; None: rows hold codes.
    In "valid" and "test" an Example keeps the row's columns, `ROW_NUMBER` and `IMAGE_SIZES`; in "test"
    also `IMAGES`.

    Raises OfakernRuntimeError for a plan with slots that cannot run yet, OfakernValueError when a closed set is
    missing.
    """

    def __init__(
        self,
        plans: Plan | Sequence[Plan],
        tokenizer: Tokenizer,
        config: PreprocessConfig | None = None,
        *,
        split: Split = "train",
        closed_sets: Mapping[str, ClosedSet] | None = None,
        files: FileSource | None = None,
        prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
        image_tokenizer: VQGAN | None = None,
    ) -> None:
        self.plans: tuple[Plan, ...] = (plans,) if isinstance(plans, Plan) else tuple(plans)
        self.tokenizer = tokenizer
        self.config = config or PreprocessConfig()
        self.split = split
        self.closed_sets = dict(closed_sets or {})
        self.files = files
        self.prepare = prepare
        self.image_tokenizer = image_tokenizer
        self.coder: BoxCoder | None = None
        for plan in self.plans:
            self._check(plan)

    def _check(self, plan: Plan) -> None:
        plan.require_available()
        for slot in plan.slots:
            self._check_slot(slot)
        kinds = {"text" if segment.text_like else segment.modality for one in self.plans for segment in one.target}
        repeated = any(not SPECS[slot.modality].text_like and slot.group is not None for slot in plan.target_slots)
        if len(plan.target) != 1 or len(kinds) > 1 or repeated:
            raise OfakernValueError(
                f"Encoder: target must be one run of text-like slots or one {_ALONE} slot, got {plan.instruction!r}"
            )

    def _check_slot(self, slot: PlanSlot) -> None:
        if slot.modality is Modality.BOX and self.coder is None:
            self.coder = self.config.box_coder(self.tokenizer.vocabulary)
        if slot.modality is Modality.PHONE and not self.tokenizer.vocabulary.range("phone"):
            raise OfakernValueError(
                f"Encoder: vocabulary must hold phones for {slot}, got none\nTry: GeneralistModel(phones=[...])"
            )
        kinds = slot.attribute("col_type")
        if kinds is not None and not check_column_kinds(str(kinds)):
            raise OfakernValueError(f"Encoder: col_type of {slot} must be like c:k:c, got {kinds!r}")
        own, steps = self.config.frames_per_step, slot.attribute("n_frames_per_step")
        if steps is not None and steps != own:
            raise OfakernValueError(f"Encoder: n_frames_per_step of {slot} must be the model's ({own}), got {steps}")
        if slot.adaptor == "image_vqgan" and not self.tokenizer.vocabulary.range("code"):
            raise OfakernValueError(
                f"Encoder: vocabulary must hold image codes for {slot}, got none\n"
                "Try: GeneralistModel(image_tokenizer=...)"
            )
        if slot.flag("closed_set") and slot.name not in self.closed_sets:
            raise OfakernValueError(f"Encoder: closed_sets must hold one for slot {slot}, got none")

    def __call__(self, row: Mapping[str, Any], index: int = 0, rng: np.random.Generator | None = None) -> Example:
        """The Example of a row. Raises DataError, naming row and column, for what cannot be used."""
        rng = np.random.default_rng(0) if rng is None else rng
        training = self.split == "train"
        plan = self.plans[int(rng.integers(len(self.plans)))] if training and len(self.plans) > 1 else self.plans[0]
        if self.prepare is not None:
            row = self.prepare(row)
        return _Sample(self, plan, row, index, rng).example()


class _Sample:
    """One row on its way; images are read once, whatever slots use them."""

    def __init__(
        self, encoder: Encoder, plan: Plan, row: Mapping[str, Any], index: int, rng: np.random.Generator
    ) -> None:
        self.encoder, self.plan, self.row, self.index, self.rng = encoder, plan, row, index, rng
        self.training = encoder.split == "train"
        self.vocabulary = encoder.tokenizer.vocabulary
        self._images: dict[tuple[str, int | None], Image.Image | Tensor] = {}

    def example(self) -> Example:
        self._check_columns()
        modality = self.plan.target[0].modality
        drop = self.encoder.config.motion.drop_prompt
        if modality is Modality.MOTION and self.training and drop and self.rng.random() < drop:
            self.row = unprompted(self.plan, self.row)
        source = list(self._source())
        if modality is Modality.AUDIO:
            return self._spoken(source)
        if modality is Modality.MOTION:
            return self._moved(source)
        if modality is Modality.IMAGE:
            return self._coded(source)
        target = self._target()
        kept = [slot.flag("closed_set") for slot in self.plan.target_slots]
        labels = [token if loss else IGNORE_LABEL for token, loss in zip(target.clean, target.loss, strict=True)]
        segment = self.plan.target[0]
        value = torch.tensor(target.inputs[:-1], dtype=torch.int64)
        return Example(
            source=source,
            target=[Segment(segment.index, segment.adaptor, int(segment.modality), value)],
            labels=torch.tensor(labels[1:], dtype=torch.int64),
            prefix_length=self._forced(target),
            allowed=target.allowed[1:] if any(kept) else None,
            columns=self._columns(),
            target_slot=torch.tensor(target.slots[1:], dtype=torch.int32),
        )

    def _spoken(self, source: list[Segment]) -> Example:
        """Of a target that is speech: the frames, what the decoder is given (one step later), where it stops."""
        segment = self.plan.target[0]
        transform = self.encoder.config.audio
        if self._to_generate():
            frames = torch.zeros(1, MEL_BINS * transform.frames_per_step)
        else:
            slot = segment.slots[0]
            where = self._where(slot, None)
            frames = transform.target(self._value(slot, None), where=where, files=self.encoder.files)
        value = torch.cat([torch.zeros_like(frames[:1]), frames[:-1]])
        labels = torch.zeros(len(frames), dtype=torch.int64)
        labels[-1] = 1
        target = Segment(segment.index, segment.adaptor, int(segment.modality), value, len(frames))
        return Example(source, [target], labels, columns=self._columns(), frames=frames)

    def _moved(self, source: list[Segment]) -> Example:
        """Of a target that is a motion: its clean frames; a still one of one frame stands for what is to be made."""
        segment = self.plan.target[0]
        if self._to_generate():
            value = torch.zeros(1, self.encoder.config.motion.coder().width)
        else:
            value = self._motion(segment.slots[0], None)
        target = Segment(segment.index, segment.adaptor, int(segment.modality), value)
        labels = torch.zeros(len(value), dtype=torch.int64)
        return Example(source, [target], labels, columns=self._columns())

    def _coded(self, source: list[Segment]) -> Example:
        """Of a target that is an image: the begin token and its codes; generation begins after the first."""
        segment, vocabulary = self.plan.target[0], self.vocabulary
        ids: list[int] = []
        if not self._to_generate():
            slot, span = segment.slots[0], vocabulary.range("code")
            tokenizer, files = self.encoder.image_tokenizer, self.encoder.files
            where = self._where(slot, None)
            found = image_codes(self._value(slot, None), tokenizer, len(span), where=where, files=files)
            ids = [span.start + code for code in found[: int(slot.attribute("length") or len(found))]]
        target = Segment(segment.index, segment.adaptor, int(segment.modality), torch.tensor([vocabulary.bos, *ids]))
        labels = torch.tensor([*ids, vocabulary.eos])
        return Example(source, [target], labels, columns=self._columns())

    # ----------------------------------------------------------------------------------------------------- columns

    def _check_columns(self) -> None:
        required = self.plan.required_columns(training=self.encoder.split != "test")
        for name in required:
            if self.row.get(name) is None:
                state = "it is empty" if name in self.row else f"columns {sorted(map(str, self.row))}"
                raise DataError(
                    f"row {self.index}: column {name!r} must be there for {self.plan.instruction!r}, got {state}"
                )

    def _columns(self) -> dict[str, Any]:
        if self.training:
            return {}
        sizes: dict[str, tuple[int, int]] = {}
        images: dict[str, Image.Image] = {}
        for (name, _), image in self._images.items():
            sizes.setdefault(name, _size(image))
            if isinstance(image, Image.Image):
                images.setdefault(name, image)
        columns = {**self.row, ROW_NUMBER: self.index, IMAGE_SIZES: sizes}
        return {**columns, IMAGES: images} if self.encoder.split == "test" else columns

    def _where(self, slot: PlanSlot, item: int | None) -> str:
        return f"row {self.index}, column {slot.name!r}" + ("" if item is None else f"[{item}]")

    def _value(self, slot: PlanSlot, item: int | None) -> Any:
        value = self.row[slot.name]
        return value if item is None else value[item]

    def _count(self, slots: Sequence[PlanSlot]) -> int:
        """How often a repeated group stands: the length of its columns' lists, which must agree."""
        counts: dict[str, int] = {}
        for slot in slots:
            if slot.name:
                value = self.row[slot.name]
                if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__"):
                    where = self._where(slot, None)
                    raise DataError(f"{where}: value of a repeated group must be a list, got {type(value).__name__}")
                counts[slot.name] = len(value)
        if len(set(counts.values())) > 1:
            raise DataError(f"row {self.index}: columns of a repeated group must have equal lengths, got {counts}")
        count = next(iter(counts.values()))
        if count == 0:
            raise DataError(f"row {self.index}: columns of a repeated group must not be empty, got {sorted(counts)}")
        return count

    # ------------------------------------------------------------------------------------------------------ source

    def _source(self) -> Iterator[Segment]:
        for group, run in groupby(self.plan.source, key=lambda segment: segment.group):
            segments = list(run)
            if group is None:
                yield from (self._segment(segment, None) for segment in segments)
                continue
            for item in range(self._count([slot for segment in segments for slot in segment.slots])):
                yield from (self._segment(segment, item) for segment in segments)

    def _segment(self, segment: PlanSegment, item: int | None) -> Segment:
        slot = segment.slots[0]
        if segment.modality is Modality.AUDIO:
            frames = self._sound(slot, item)
            return Segment(segment.index, segment.adaptor, int(segment.modality), frames, tokens_of(len(frames)))
        if segment.modality is Modality.VIDEO:
            value = self._video(slot, item)
            length = len(value) * self.encoder.config.image_tokens[segment.adaptor]
            return Segment(segment.index, segment.adaptor, int(segment.modality), value, length)
        if segment.modality is Modality.MOTION:
            return Segment(segment.index, segment.adaptor, int(segment.modality), self._motion(slot, item))
        if not segment.text_like:
            tokens = self.encoder.config.image_tokens.get(segment.adaptor)
            return Segment(segment.index, segment.adaptor, int(segment.modality), self._pixels(slot, item), tokens)
        ids: list[int] = []
        for slot, place in self._placed(segment, item):
            clean = self._ids(slot, place)
            ids += self._corrupted(slot, clean, keep_length=False)
        if segment.auto_bos_eos:
            limit = self.encoder.config.max_source_length
            ids = [self.vocabulary.bos, *ids[: limit - 2], self.vocabulary.eos]
        else:
            ids = ids[: self.encoder.config.max_source_length]
        if not ids:
            raise DataError(f"row {self.index}: source must have tokens, got none for {self.plan.instruction!r}")
        return Segment(segment.index, segment.adaptor, int(segment.modality), torch.tensor(ids, dtype=torch.int64))

    def _placed(self, segment: PlanSegment, item: int | None) -> Iterator[tuple[PlanSlot, int | None]]:
        """The segment's slots in the order of their tokens, repeated groups unrolled, each with its place in the

        List.
        """
        for group, slots in segment.runs():
            if group is None or segment.group is not None:
                yield from ((slot, item) for slot in slots)
                continue
            for place in range(self._count(slots)):
                yield from ((slot, place) for slot in slots)

    # ------------------------------------------------------------------------------------------------------ target

    def _target(self) -> _Tokens:
        segment = self.plan.target[0]
        number = {id(slot): i for i, slot in enumerate(self.plan.target_slots)}
        tokens = _Tokens()
        tokens.add([self.vocabulary.bos], [self.vocabulary.bos], 0, False, [_ANY])
        if self._to_generate():
            for slot in self._head():
                self._add(tokens, slot, None, number[id(slot)], None)
            # one place more than the inputs: the first token that generation has to find
            tokens.add([self.vocabulary.pad], [self.vocabulary.pad], 0, False, [_ANY])
            return self._cut(tokens)
        placed = list(self._placed(segment, None))
        for (slot, item), following in zip(placed, [*placed[1:], None], strict=True):
            self._add(tokens, slot, item, number[id(slot)], following)
        if not self._closed(placed[-1][0]):
            tokens.add([self.vocabulary.eos], [self.vocabulary.eos], number[id(placed[-1][0])], True, [_ANY])
        return self._cut(tokens)

    def _to_generate(self) -> bool:
        return any(slot.loss and self.row.get(slot.name) is None for slot in self.plan.target_slots)

    def _head(self) -> list[PlanSlot]:
        return [slot for slot in self.plan.target_slots if slot.generator == "forced"]

    def _forced(self, tokens: _Tokens) -> int:
        """Decoder inputs, after the begin token, that generation is given."""
        head = {i for i, slot in enumerate(self.plan.target_slots) if slot.generator == "forced"}
        return sum(slot in head for slot in tokens.slots[1 : len(tokens.slots) - 1])

    def _closed(self, slot: PlanSlot) -> bool:
        return slot.loss and slot.flag("closed_set")

    def _add(
        self,
        tokens: _Tokens,
        slot: PlanSlot,
        item: int | None,
        number: int,
        following: tuple[PlanSlot, int | None] | None,
    ) -> None:
        clean = self._ids(slot, item)
        inputs = self._corrupted(slot, clean, keep_length=True)
        if not self._closed(slot):
            tokens.add(clean, inputs, number, slot.loss, [_ANY] * len(clean))
            return
        closed = self.encoder.closed_sets[slot.name]
        if clean not in closed:
            raise DataError(
                f"{self._where(slot, item)}: answer must be one of the closed set ({len(closed)} answers), "
                f"got {self._value(slot, item)!r}"
            )
        end = self.vocabulary.eos if following is None else self._ids(*following)[0]
        allowed = closed.allowed_along(clean, end)
        tokens.add(clean, inputs, number, True, allowed[:-1])
        if following is None:
            tokens.add([end], [end], number, True, allowed[-1:])

    def _cut(self, tokens: _Tokens) -> _Tokens:
        """At most `max_target_length` decoder inputs; the last token (end of sequence) is kept."""
        keep = self.encoder.config.max_target_length
        if len(tokens.clean) <= keep + 1:
            return tokens
        parts = (tokens.clean, tokens.inputs, tokens.slots, tokens.loss, tokens.allowed)
        return _Tokens(*([*part[:keep], part[-1]] for part in parts))

    # ------------------------------------------------------------------------------------------------------- slots

    def _ids(self, slot: PlanSlot, item: int | None) -> list[int]:
        """The clean token ids of a text-like slot or plain text, at place `item` of its list."""
        if slot.plain:
            return self.encoder.tokenizer.encode(slot.text)
        where = self._where(slot, item)
        if slot.modality is Modality.BOX:
            return self._bins(slot, item, where)
        if slot.modality is Modality.PHONE:
            return encode_phones(self._value(slot, item), self.vocabulary, where=where)
        if slot.modality is Modality.STRUCT:
            written = table_text(self._value(slot, item), str(slot.attribute("col_type", "") or ""), where=where)
            return encode_text(written, self.encoder.tokenizer, where=where, **_text_options(slot))
        return encode_text(self._value(slot, item), self.encoder.tokenizer, where=where, **_text_options(slot))

    def _bins(self, slot: PlanSlot, item: int | None, where: str) -> list[int]:
        coder = self.encoder.coder
        if coder is None:
            raise OfakernValueError(f"Encoder: plan must have been checked, got box slot {slot} without bins")
        size = _size(self._image(slot.image, self._image_item(slot, item)))
        start = self.vocabulary.range("bin").start
        return [start + k for k in coder.encode(parse_box(self._value(slot, item), where=where, size=size), size)]

    def _image_item(self, box: PlanSlot, item: int | None) -> int | None:
        """The place of a box's image in its list: the box's own when both stand in the same repeated group."""
        image = next(slot for slot in self.plan.slots if slot.name == box.image)
        if image.group is None:
            return None
        return item if image.group == box.group else 0

    def _corrupted(self, slot: PlanSlot, ids: list[int], *, keep_length: bool) -> list[int]:
        noise, mask = slot.attribute("noise_ratio", 0.0), slot.attribute("mask_ratio", 0.0)
        if not self.training or not (noise or mask):
            return ids
        if slot.modality is Modality.PHONE:
            return mask_phones(ids, self.vocabulary, self.rng, float(mask or 0.0))
        return corrupt(
            ids,
            self.vocabulary,
            self.rng,
            noise_ratio=float(noise or 0.0),
            mask_ratio=float(mask or 0.0),
            keep_length=keep_length,
        )

    def _sound(self, slot: PlanSlot, item: int | None) -> Tensor:
        return self.encoder.config.audio.source(
            self._value(slot, item),
            normalize=slot.flag("normalize"),
            widest=(int(slot.attribute("freq_mask", 0) or 0), int(slot.attribute("time_mask", 0) or 0)),
            rng=self.rng if self.training else None,
            where=self._where(slot, item),
            files=self.encoder.files,
        )

    def _video(self, slot: PlanSlot, item: int | None) -> Tensor:
        transform, value = self.encoder.config.video, self._value(slot, item)
        if transform.is_ready(value):
            return torch.as_tensor(value, dtype=torch.float32)
        rng = self.rng if self.training else None
        where, files = self._where(slot, item), self.encoder.files
        return transform(load_frames(value, transform.frames, where=where, files=files, rng=rng))

    def _motion(self, slot: PlanSlot, item: int | None) -> Tensor:
        settings, where = self.encoder.config.motion, self._where(slot, item)
        motion = load_motion(self._value(slot, item), where=where, files=self.encoder.files, like=settings)
        clip = MotionClip.of(dict(slot.attributes))
        return encode_motion(motion, settings, clip, self.rng if self.training else None, where)

    def _pixels(self, slot: PlanSlot, item: int | None) -> Tensor:
        config = self.encoder.config
        ratio = float(slot.attribute("mask_ratio", 0.0) or 0.0)
        transform = ImageTransform(config.image_size, config.image_mean, config.image_std, ratio)
        image = self._image(slot.name, item)
        return transform(image) if isinstance(image, Image.Image) else transform.ready(image)

    def _image(self, name: str, item: int | None) -> Image.Image | Tensor:
        """The image of a column, read once: PIL, or the normalised tensor that the row already holds."""
        key = name, item
        if key not in self._images:
            config = self.encoder.config
            value = self.row[name] if item is None else self.row[name][item]
            where = f"row {self.index}, column {name!r}" + ("" if item is None else f"[{item}]")
            if ImageTransform(config.image_size).is_ready(value):
                self._images[key] = torch.as_tensor(value)
            else:
                self._images[key] = load_image(
                    value, where=where, files=self.encoder.files, max_pixels=config.max_pixels
                )
        return self._images[key]


def unprompted(plan: Plan, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with empty text in every TEXT slot of the source: what guidance leads away from."""
    slots = [slot for segment in plan.source for slot in segment.slots]
    texts = {slot.name for slot in slots if slot.name and slot.modality is Modality.TEXT}
    empty = {name: "" if isinstance(row[name], str) else [""] * len(row[name]) for name in texts}
    return {**row, **empty}


def _size(image: Image.Image | Tensor) -> tuple[int, int]:
    """(width, height) in pixels."""
    return image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])


def _text_options(slot: PlanSlot) -> dict[str, Any]:
    return {
        "uncased": slot.flag("uncased"),
        "no_punctuation": slot.flag("no_punctuation"),
        "max_length": slot.attribute("max_length"),
    }

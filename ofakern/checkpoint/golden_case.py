"""One recorded case as a packed batch, and the way back from packed rows to the recording's padded positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ofakern.checkpoint.golden import read_json
from ofakern.checkpoint.ofasys import PAD
from ofakern.data.batch import IGNORE_LABEL, Example, PackedBatch, PackedSide, Segment
from ofakern.errors import DataError
from ofakern.instruction.modality import Modality
from ofakern.modality.audio.adaptor import tokens_in_ofasys
from ofakern.model import OFAPlus
from ofakern.ops.attention import AttentionLayout

_TEXTUAL = {Modality.TEXT, Modality.BOX, Modality.PHONE, Modality.STRUCT, Modality.CATEGORY}

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Slot:
    """A recorded slot: values int64 `[B, n]`, images f32 `[B, 3, S, S]`, filter banks f32 `[B, t, 80]`, videos f32
    `[B, 3, frames, S, S]` or motions f32 `[B, frames, D]`; padded: positions it takes in the recording; frames: of each
    sample's filter banks, the rest is padding; lengths: positions of each sample where the values do not tell; levels:
    of noise, of each sample's motion. written: a target's frames, each a token; the recording's padding stays there,
    because its post-net has seen it."""

    number: int
    modality: Modality
    adaptor: str
    values: np.ndarray
    padded: int
    frames: tuple[int, ...] = ()
    written: bool = False
    lengths: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()

    def segment(self, sample: int) -> Segment:
        value, kept = torch.from_numpy(np.ascontiguousarray(self.values[sample])), self.kept(sample)
        if value.dim() == 1:
            value = value[:kept]
        if self.modality is Modality.VIDEO:
            value = value.transpose(0, 1)[: kept * value.shape[1] // self.padded]
        if self.modality is Modality.MOTION:
            levels = torch.full((kept,), self.levels[sample] + 1) if self.levels else None
            return Segment(self.number, self.adaptor, int(self.modality), value[:kept], levels=levels)
        return Segment(self.number, self.adaptor, int(self.modality), value, kept)

    def kept(self, sample: int) -> int:
        """Positions of a sample that are not padding (of written frames: all)."""
        if self.written:
            return self.padded
        if self.lengths:
            return self.lengths[sample]
        if self.values.ndim != 2:
            return self.padded
        real = self.values[sample] != PAD
        count = int(real.sum())
        if not real[:count].all():
            raise DataError(f"slot {self.number}: pads must stand at the end, got one inside sample {sample}")
        return count


class Case:
    """A case's arrays, its slots and its batches."""

    def __init__(self, directory: Path, name: str, model: OFAPlus) -> None:
        self.name = name
        self.meta: dict[str, Any] = read_json(directory / f"{name}.json")
        path = directory / f"{name}.npz"
        if not path.is_file():
            raise DataError(f"parity: case must have a file {path}, got none")
        with np.load(path) as arrays:
            self.arrays: Arrays = {key: arrays[key] for key in arrays.files}
        self._model = model
        self.unavailable = _unavailable(self.arrays, model)
        if self.unavailable is None:
            slots = _slots(self.arrays, model)
            self.source, self.target = slots[:-1], slots[-1]

    @property
    def samples(self) -> int:
        return int(self.target.values.shape[0])

    def side(self, source: bool) -> list[Slot]:
        return self.source if source else [self.target]

    def batch(self, samples: Sequence[int]) -> PackedBatch:
        """The packed batch of these samples, in this order."""
        batch = PackedBatch.collate([self._example(sample) for sample in samples])
        if self.target.written:
            hide_padding(self._model, batch.target, [self.target.frames[sample] for sample in samples])
        return batch

    def rows(self, samples: Sequence[int], source: bool) -> tuple[np.ndarray, np.ndarray]:
        """(sample, padded position) of every packed row of `batch(samples)`."""
        owners, positions = [], []
        for sample in samples:
            begin = 0
            for slot in self.side(source):
                kept = slot.kept(sample)
                owners.append(np.full(kept, sample))
                positions.append(begin + np.arange(kept))
                begin += slot.padded
        return np.concatenate(owners), np.concatenate(positions)

    def slot_rows(self, slot: Slot, source: bool, sample: int) -> slice:
        """The packed rows of a slot in `batch(range(B))`."""
        slots = self.side(source)
        before = sum(s.kept(b) for b in range(sample) for s in slots)
        before += sum(s.kept(sample) for s in slots if s.number < slot.number)
        return slice(before, before + slot.kept(sample))

    def calls(self, source: bool) -> list[tuple[str, Slot]]:
        """(array prefix, slot) of every recorded adaptor call: the reference calls them by modality, then slot."""
        side = "encoder" if source else "decoder"
        ordered = sorted(self.side(source), key=lambda slot: (int(slot.modality), slot.number))
        return [(f"{side}.adaptor_call{k}.{slot.adaptor}", slot) for k, slot in enumerate(ordered)]

    def _example(self, sample: int) -> Example:
        if self.target.written:
            return self._written(sample)
        kept = self.target.kept(sample)
        target = torch.zeros(kept, dtype=torch.int64)
        if "target" in self.arrays:
            target = torch.from_numpy(self.arrays["target"][sample, :kept].astype(np.int64))
        allowed: list[Tensor] | None = None
        if "constraint_masks" in self.arrays:
            masks = torch.from_numpy(self.arrays["constraint_masks"][sample, :kept])
            allowed = [mask.nonzero()[:, 0] for mask in masks]
        return Example(
            source=[slot.segment(sample) for slot in self.source],
            target=[self.target.segment(sample)],
            labels=target.masked_fill(target == PAD, IGNORE_LABEL),
            allowed=allowed,
        )

    def _written(self, sample: int) -> Example:
        real = self.target.frames[sample]
        labels = torch.zeros(self.target.padded, dtype=torch.int64)
        labels[real - 1] = 1
        labels[real:] = IGNORE_LABEL
        source = [slot.segment(sample) for slot in self.source]
        frames = torch.from_numpy(self.arrays["target"][sample])
        return Example(source, [self.target.segment(sample)], labels, frames=frames)


def hide_padding(model: OFAPlus, side: PackedSide, lengths: Sequence[int]) -> None:
    """Keeps all tokens of a target, of which only each sample's first `lengths` are seen as keys: as OFASys has it."""
    plan = model.decoder.adaptor.plan(side)
    layout = plan.layout
    ends = side.offsets[:-1] + torch.tensor(lengths, dtype=torch.int32)
    visible = layout.visible.clone()
    visible[:, 1] = visible[:, 1].minimum(ends.repeat_interleave(side.offsets.diff()))
    lengths, sets = side.lengths_cpu, None if plan.sets is None else plan.sets.numbers
    layout = AttentionLayout.build(visible, lengths, lengths, list(layout.terms), sets, sets)
    for key in [key for key, value in side.cache.items() if value is plan]:
        side.cache[key] = replace(plan, layout=layout)


def _slots(arrays: Arrays, model: OFAPlus) -> list[Slot]:
    names = sorted({".".join(key.split(".")[:3]) for key in arrays if key.startswith("input.slot")}, key=_slot_number)
    return [_slot(arrays, name, "decoder" if name == names[-1] else "encoder") for name in names]


def _slot(arrays: Arrays, name: str, side: str) -> Slot:
    number, modality = _slot_number(name), Modality[name.split(".")[2]]
    if modality is Modality.AUDIO:
        values = arrays[f"{name}.fbank"]
        frames = tuple(int(n) for n in arrays[f"{name}.fbank_lengths"])
        if side == "decoder":
            return Slot(number, modality, "audio_fbank", values, values.shape[1], frames, written=True)
        padded = _recorded_positions(arrays, "audio_fbank")
        kept = tuple(tokens_in_ofasys(n, values.shape[1]) for n in frames)
        return Slot(number, modality, "audio_fbank", values, padded, frames, lengths=kept)
    if modality is Modality.MOTION:
        noised = "diffusion_input.slot0.MOTION"
        values = arrays[f"{noised}.value"]
        kept = tuple(int(n) for n in (~arrays[f"{noised}.masks"]).sum(1))
        levels = tuple(int(t) for t in arrays[f"{noised}.noise_level"])
        return Slot(number, modality, "motion_6d", values, values.shape[1], lengths=kept, levels=levels)
    values = arrays[f"{name}.value"]
    if modality in _TEXTUAL:
        return Slot(number, modality, "text", values, values.shape[1])
    if modality is Modality.VIDEO:
        adaptor, padded = "video_image_sequence", _recorded_positions(arrays, "video_image_sequence")
        kept = tuple(padded // len(shown) * int(shown.sum()) for shown in _shown_frames(values))
        return Slot(number, modality, adaptor, values, padded, lengths=kept)
    adaptor = _image_adaptor(arrays, side)
    padded = values.shape[1] if values.ndim == 2 else _recorded_positions(arrays, adaptor)
    return Slot(number, modality, adaptor, values, padded)


def _shown_frames(videos: np.ndarray) -> np.ndarray:
    """bool `[B, frames]`: that implementation takes frames that are zero everywhere for padding."""
    shown: np.ndarray = np.abs(videos).mean(axis=(1, 3, 4)) != 0
    return shown


def _slot_number(key: str) -> int:
    return int(key.split(".")[1].removeprefix("slot"))


def _image_adaptor(arrays: Arrays, side: str) -> str:
    names = {a for a in _recorded_adaptors(arrays) if a[0] == side and a[1].startswith("image")}
    if len(names) != 1:
        raise DataError(f"parity: a case must use one image adaptor per side, got {sorted(n for _, n in names)}")
    return names.pop()[1]


def _recorded_positions(arrays: Arrays, adaptor: str) -> int:
    key = next(k for k in arrays if k.startswith("encoder.adaptor_call") and k.endswith(f".{adaptor}.embed"))
    return int(arrays[key].shape[1])


def _recorded_adaptors(arrays: Arrays) -> set[tuple[str, str]]:
    return {(k.split(".")[0], k.split(".")[2]) for k in arrays if ".adaptor_call" in k}


def _unavailable(arrays: Arrays, model: OFAPlus) -> str | None:
    """The adaptor or modality that keeps a case from running here, or None."""
    sides = {"encoder": model.encoder.adaptor.adaptors, "decoder": model.decoder.adaptor.adaptors}
    for side, adaptor in sorted(_recorded_adaptors(arrays)):
        if adaptor not in sides[side]:
            return f"{_modality_of(arrays, adaptor)} ({adaptor})"
    return None


def _modality_of(arrays: Arrays, adaptor: str) -> str:
    word = adaptor.split("_")[0].upper()
    names = {k.split(".")[2] for k in arrays if k.startswith("input.slot")}
    return word if word in names else " ".join(sorted(names - {m.name for m in _TEXTUAL})) or word

"""Examples and packed batches: what the data pipeline hands to the model.

A batch has no padding. All samples' tokens of one side (source or target) stand end to end; every adaptor gets the
values of all segments that use it, together with the packed rows those tokens take. Everything here is plain tensors
on the CPU until `PackedBatch.to` moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ofakern.errors import DataError

IGNORE_LABEL = -100


@dataclass(frozen=True)
class Segment:
    """One run of tokens of one sample: the value of one slot (or of one merged group of text slots).

    plan_segment: index of the plan's segment; adaptor: the adaptor's name (`text`, `image_resnet`, ...);
    modality: `int(Modality)`; value: int64 `[n]` token ids for text, float32 `[3, S, S]` for an image, `[frames, F]`
    for sound and motion (in a target a token each), `[frames, 3, S, S]` for a video; positions: int64 `[length]`, for
    an image of which only some patches are taken: their places in the grid, in the order of the tokens. length: packed
    tokens the value takes. None: `n` for text, ceil(S/16)^2 for `image_resnet`, `frames` for `motion_6d`; other
    adaptors need it. levels: int64 `[length]`, noise levels of a motion's frames (0: none).
    """

    plan_segment: int
    adaptor: str
    modality: int
    value: Tensor
    length: int | None = None
    positions: Tensor | None = None
    levels: Tensor | None = None

    def tokens(self) -> int:
        """The number of packed tokens. Raises DataError when it cannot be known."""
        if self.length is not None:
            return self.length
        if self.positions is not None:
            return self.positions.shape[0]
        if self.value.dim() == 1 or self.adaptor == "motion_6d":
            return self.value.shape[0]
        if self.adaptor == "image_resnet" and self.value.dim() == 3:
            return -(-self.value.shape[1] // 16) * -(-self.value.shape[2] // 16)
        raise DataError(
            f"Segment: length must be given for adaptor {self.adaptor!r} with a value of shape "
            f"{tuple(self.value.shape)}, got None"
        )


@dataclass(frozen=True)
class Example:
    """One sample, preprocessed.

    source, target: segments in instruction order; the target's values are the decoder's INPUT (begin token first).
    labels: int64 `[L]`, L = target tokens, -100 where there is no loss. prefix_length: leading decoder inputs after the
    begin token that generation forces. allowed: per label position the allowed ids (an empty tensor allows all).
    columns: the row's other values, kept for metrics and output. target_slot: int32 `[L]`, a token's target slot.
    frames: f32 `[L, F]`, what each target token should become where tokens are frames of sound; labels are then 1 at
    the last frame and 0 before it.
    """

    source: list[Segment]
    target: list[Segment]
    labels: Tensor
    prefix_length: int = 0
    allowed: list[Tensor] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    target_slot: Tensor | None = None
    frames: Tensor | None = None


@dataclass(frozen=True)
class Allowed:
    """Allowed token ids per label row as CSR: row i allows `ids[offsets[i]:offsets[i+1]]`; an empty row allows all.

    offsets int64 `[Nt + 1]`, ids int64 `[nnz]`.
    """

    offsets: Tensor
    ids: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Allowed:
        return _moved(self, _mover(device, non_blocking))


@dataclass(frozen=True)
class AdaptorInput:
    """The values of all segments of one side that use one adaptor (and, for images, have one size).

    value: text int64 `[n_tokens]`; images float32 `[n, 3, S, S]`; videos `[n, frames, 3, S, S]`; frames, each a token,
    `[n_tokens, F]`; other frames `[n, longest, F]`, zero behind a segment's own. levels: int64 `[n_tokens]`, noise
    levels of a motion's frames. lengths: int32 `[n]` tokens per segment.
    plan_segment, sample: int32 `[n]`. rows: int64 `[n_tokens]` packed rows, contiguous and increasing inside a segment;
    positions: int64 `[n_tokens]`, counted from 0 inside the segment. starts: int32 `[n]`, a segment's first row.
    partial: the positions are places in each image's grid, of which only these patches are taken.
    """

    adaptor: str
    plan_segment: Tensor
    value: Tensor
    lengths: Tensor
    rows: Tensor
    positions: Tensor
    sample: Tensor
    starts: Tensor
    partial: bool = False
    levels: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AdaptorInput:
        return _moved(self, _mover(device, non_blocking))


_Movable = TypeVar("_Movable", Allowed, AdaptorInput)


@dataclass
class PackedSide:
    """The packed tokens of one side of a batch; N tokens, B samples.

    offsets int32 `[B + 1]`; sample_id, segment_id (the plan's), segment_order (of the segment inside its sample),
    modality_id, target_slot_id (-1 on the source): int32 `[N]`. `lengths_cpu`: tokens per sample as Python ints, so
    that no layer has to ask the device. `cache` holds what a model prepares once per batch (attention layouts).
    """

    segments: list[AdaptorInput]
    offsets: Tensor
    sample_id: Tensor
    segment_id: Tensor
    segment_order: Tensor
    modality_id: Tensor
    target_slot_id: Tensor
    lengths_cpu: tuple[int, ...]
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        return self.sample_id.shape[0]

    @property
    def samples(self) -> int:
        return len(self.lengths_cpu)

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedSide:
        """The side on another device; layouts are kept (moved) when a model has prepared them."""
        move = _mover(device, non_blocking)
        moved: dict[str, Any] = {
            f.name: move(getattr(self, f.name)) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        segments = [s.to(device, non_blocking) for s in self.segments]
        cache = {k: v.to(device) if hasattr(v, "to") else v for k, v in self.cache.items()}
        return replace(self, segments=segments, cache=cache, **moved)

    @classmethod
    def pack(
        cls, samples: Sequence[Sequence[Segment]], target_slots: Sequence[Tensor | None] | None = None
    ) -> PackedSide:
        """Packs one side. samples: each one's segments; target_slots: each one's int32 `[L]` or None (all 0)."""
        groups: dict[tuple[Any, ...], list[tuple[Segment, int, int, int]]] = {}
        columns: dict[str, list[Tensor]] = {name: [] for name in _TOKEN_COLUMNS}
        lengths = []
        row = 0
        for sample, segments in enumerate(samples):
            begin = row
            for order, segment in enumerate(segments):
                count = segment.tokens()
                _check_segment(segment, sample, count)
                joining = _stacking(segment.value, count)
                key = (segment.adaptor, *joining, segment.positions is not None, segment.levels is not None)
                groups.setdefault(key, []).append((segment, sample, row, count))
                for name, value in zip(
                    _TOKEN_COLUMNS, (sample, segment.plan_segment, order, segment.modality), strict=True
                ):
                    columns[name].append(torch.full((count,), value, dtype=torch.int32))
                row += count
            lengths.append(row - begin)
        stacked: dict[str, Any] = {
            name: torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32) for name, parts in columns.items()
        }
        return cls(
            segments=[_adaptor_input(adaptor, entries) for (adaptor, *_), entries in groups.items()],
            offsets=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            target_slot_id=_target_slots(lengths, target_slots),
            lengths_cpu=tuple(lengths),
            **stacked,
        )


_TOKEN_COLUMNS = ("sample_id", "segment_id", "segment_order", "modality_id")


@dataclass
class PackedBatch:
    """A batch: two sides, labels int64 `[Nt]`, prefix_lengths int32 `[B]`, allowed ids, columns (lists of B), frames.

    frames: f32 `[Nt, F]`, what the target's tokens should become where they are frames of sound, or None.
    """

    source: PackedSide
    target: PackedSide
    labels: Tensor
    prefix_lengths: Tensor
    allowed: Allowed | None = None
    columns: dict[str, list[Any]] = field(default_factory=dict)
    frames: Tensor | None = None

    @property
    def samples(self) -> int:
        return self.source.samples

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch on `device`; columns stay as they are."""
        return PackedBatch(
            source=self.source.to(device, non_blocking),
            target=self.target.to(device, non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            prefix_lengths=self.prefix_lengths.to(device, non_blocking=non_blocking),
            allowed=None if self.allowed is None else self.allowed.to(device, non_blocking),
            columns=self.columns,
            frames=None if self.frames is None else self.frames.to(device, non_blocking=non_blocking),
        )

    @classmethod
    def collate(cls, examples: Sequence[Example]) -> PackedBatch:
        """Packs examples in the order given. Raises DataError for an empty list or lengths that do not agree."""
        if not examples:
            raise DataError("PackedBatch.collate: examples must hold at least one example, got 0")
        for index, example in enumerate(examples):
            _check_example(example, index)
        names = {name for example in examples for name in example.columns}
        return cls(
            source=PackedSide.pack([e.source for e in examples], None),
            target=PackedSide.pack([e.target for e in examples], [e.target_slot for e in examples]),
            labels=torch.cat([e.labels for e in examples]),
            prefix_lengths=torch.tensor([e.prefix_length for e in examples], dtype=torch.int32),
            allowed=_collate_allowed(examples),
            columns={name: [e.columns.get(name) for e in examples] for name in sorted(names)},
            frames=_collate_frames(examples),
        )


def _stacking(value: Tensor, tokens: int) -> tuple[Any, ...]:
    """Values that agree in this stand in one input: how they are joined, and the shape that must agree."""
    if value.dim() == 1:
        return "join", ()
    if value.dim() == 2:  # frames: a token each, or several to a token
        return "join" if value.shape[0] == tokens else "pad", tuple(value.shape[1:])
    return "stack", tuple(value.shape)


def _joined(values: list[Tensor], tokens: int) -> Tensor:
    """The values of segments that agree in their stacking; tokens: of the first one."""
    how = _stacking(values[0], tokens)[0]
    if how == "pad":
        return pad_sequence(values, batch_first=True)
    return torch.cat(values) if how == "join" else torch.stack(values)


def _adaptor_input(adaptor: str, entries: list[tuple[Segment, int, int, int]]) -> AdaptorInput:
    values = [segment.value for segment, _, _, _ in entries]
    rows = [torch.arange(row, row + count) for _, _, row, count in entries]
    return AdaptorInput(
        adaptor=adaptor,
        plan_segment=torch.tensor([s.plan_segment for s, _, _, _ in entries], dtype=torch.int32),
        value=_joined(values, entries[0][3]),
        lengths=torch.tensor([count for _, _, _, count in entries], dtype=torch.int32),
        rows=torch.cat(rows),
        positions=torch.cat([torch.arange(n) if s.positions is None else s.positions for s, _, _, n in entries]),
        sample=torch.tensor([sample for _, sample, _, _ in entries], dtype=torch.int32),
        starts=torch.tensor([row for _, _, row, _ in entries], dtype=torch.int32),
        partial=entries[0][0].positions is not None,
        levels=None
        if entries[0][0].levels is None
        else torch.cat([s.levels for s, _, _, _ in entries if s.levels is not None]),
    )


def _target_slots(lengths: Sequence[int], slots: Sequence[Tensor | None] | None) -> Tensor:
    if slots is None:
        return torch.full((sum(lengths),), -1, dtype=torch.int32)
    parts = [
        torch.zeros(length, dtype=torch.int32) if slot is None else slot.to(torch.int32)
        for length, slot in zip(lengths, slots, strict=True)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)


def _collate_allowed(examples: Sequence[Example]) -> Allowed | None:
    if all(example.allowed is None for example in examples):
        return None
    empty = torch.empty(0, dtype=torch.int64)
    rows: list[Tensor] = []
    for example in examples:
        rows.extend(example.allowed if example.allowed is not None else [empty] * example.labels.shape[0])
    counts = torch.tensor([0, *(row.shape[0] for row in rows)], dtype=torch.int64)
    return Allowed(offsets=counts.cumsum(0), ids=torch.cat(rows) if rows else empty)


def _collate_frames(examples: Sequence[Example]) -> Tensor | None:
    frames = [example.frames for example in examples if example.frames is not None]
    if frames and len(frames) < len(examples):
        raise DataError(f"PackedBatch.collate: frames must be there for all examples or none, got {len(frames)}")
    return torch.cat(frames) if frames else None


def _check_segment(segment: Segment, sample: int, count: int) -> None:
    where = f"PackedSide.pack: sample {sample}, segment {segment.plan_segment}"
    if segment.value.dim() == 1 and segment.value.dtype != torch.int64:
        raise DataError(f"{where}: value must be int64 for token ids, got {segment.value.dtype}")
    if segment.value.dim() == 1 and segment.value.shape[0] != count:
        raise DataError(f"{where}: length must equal the number of token ids ({segment.value.shape[0]}), got {count}")
    if segment.levels is not None and tuple(segment.levels.shape) != (count,):
        raise DataError(f"{where}: levels must be int64 [{count}], got {list(segment.levels.shape)}")
    chosen = segment.positions
    if chosen is not None and (chosen.dtype != torch.int64 or tuple(chosen.shape) != (count,)):
        raise DataError(f"{where}: positions must be int64 [{count}], got {chosen.dtype} {list(chosen.shape)}")
    if segment.value.device.type != "cpu":
        raise DataError(f"{where}: value must be on the CPU, got {segment.value.device}")


def _check_example(example: Example, index: int) -> None:
    where = f"PackedBatch.collate: example {index}"
    tokens = sum(segment.tokens() for segment in example.target)
    if example.labels.dtype != torch.int64:
        raise DataError(f"{where}: labels must be int64, got {example.labels.dtype}")
    if example.labels.shape != (tokens,):
        raise DataError(
            f"{where}: labels must have one entry per target token ({tokens}), got {tuple(example.labels.shape)}"
        )
    if example.frames is not None and example.frames.shape[:-1] != (tokens,):
        raise DataError(
            f"{where}: frames must have one row per target token ({tokens}), got {tuple(example.frames.shape)}"
        )
    if example.allowed is not None and len(example.allowed) != tokens:
        raise DataError(f"{where}: allowed must have one entry per target token ({tokens}), got {len(example.allowed)}")
    if example.target_slot is not None and example.target_slot.shape != (tokens,):
        raise DataError(
            f"{where}: target_slot must have one entry per target token ({tokens}), "
            f"got {tuple(example.target_slot.shape)}"
        )


def _mover(device: torch.device | str, non_blocking: bool) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device, non_blocking=non_blocking)


def _moved(item: _Movable, move: Callable[[Tensor], Tensor]) -> _Movable:
    tensors: dict[str, Any] = {
        f.name: move(getattr(item, f.name)) for f in fields(item) if isinstance(getattr(item, f.name), Tensor)
    }
    return replace(item, **tensors)

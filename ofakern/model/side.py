"""What one side of a batch needs once, for all layers: the attention layout, the relative blocks, the packing order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ofakern.data.batch import AdaptorInput, PackedSide
from ofakern.errors import OfakernValueError
from ofakern.nn.adaptor import Adaptor
from ofakern.nn.experts import Routing
from ofakern.nn.relative import RelativeBlock
from ofakern.ops.attention import AttentionLayout, RelativeTerm, same_prefixes
from ofakern.ops.attention.intervals import causal as causal_intervals
from ofakern.ops.attention.intervals import cross as cross_intervals
from ofakern.ops.attention.intervals import full as full_intervals


@dataclass(frozen=True)
class PositionSets:
    """Samples whose tokens have the same position embeddings, as far as they go: images of one size, texts.

    numbers: of each sample, its set. rows: int64 `[M]`, the packed tokens of each set's longest sample, set by set.
    """

    numbers: tuple[int, ...]
    rows: Tensor

    def take(self, positions: Tensor) -> Tensor:
        """The sets' rows `[M, D]` of position embeddings `[N, D]`."""
        return positions.index_select(0, self.rows)

    def to(self, device: torch.device | str) -> PositionSets:
        return replace(self, rows=self.rows.to(device))


@dataclass(frozen=True)
class SidePlan:
    """layout: of self-attention. blocks: (adaptor's name, block) in table order, second_blocks: those of the second
    relative term. order: int64 `[N]`, the row of the
    concatenated adaptor outputs that each packed token takes; None when that is the identity. routing: of the tokens to
    feed-forward experts, where the model has them. sets: samples that share their positions, where it pays."""

    layout: AttentionLayout
    blocks: tuple[tuple[str, RelativeBlock], ...]
    order: Tensor | None
    routing: Routing | None = None
    second_blocks: tuple[tuple[str, RelativeBlock], ...] = ()
    sets: PositionSets | None = None

    def factored_rows(self, positions: Tensor) -> Tensor:
        """The rows of position embeddings `[N, D]` that the factored term is made of: as the layout counts them."""
        return positions if self.sets is None else self.sets.take(positions)

    def to(self, device: torch.device | str) -> SidePlan:
        return replace(
            self,
            layout=self.layout.to(device),
            blocks=tuple((name, block.to(device)) for name, block in self.blocks),
            second_blocks=tuple((name, block.to(device)) for name, block in self.second_blocks),
            order=None if self.order is None else self.order.to(device),
            routing=None if self.routing is None else self.routing.to(device),
            sets=None if self.sets is None else self.sets.to(device),
        )


def plan_side(
    side: PackedSide,
    adaptors: Mapping[str, Adaptor],
    causal: bool,
    relative: bool,
    experts: str = "",
    factored: bool = True,
) -> SidePlan:
    """Builds a side's plan on the CPU and moves it to the side's device.

    factored: there is a factored position term, which samples may share.
    experts: "": none; "modality": a token's expert is its modality; "ofasys": as that implementation routes.
    """
    first, second = _TermBuilder(side.tokens), _TermBuilder(side.tokens)
    for values in side.segments:
        adaptor = find_adaptor(adaptors, values)
        block = adaptor.block(values, causal) if relative else None
        if block is not None:
            first.add(values, block, adaptor.coordinates(values), adaptor.key_coordinates(values))
        block = adaptor.second_block(values) if relative else None
        if block is not None:
            coordinates = adaptor.second_coordinates(values)
            second.add(values, block, coordinates, coordinates)
    terms = [builder.term() for builder in (first, second) if builder.blocks]
    lengths = side.lengths_cpu
    visible = causal_intervals(lengths) if causal else full_intervals(lengths)
    sets = position_sets(side) if factored else None
    numbers = None if sets is None else sets.numbers
    layout = AttentionLayout.build(visible, lengths, lengths, terms, numbers, numbers)
    routing = None
    if experts:
        modality = side.modality_id.cpu() if experts == "modality" else _misplaced_modality(side)
        routing = Routing.build(modality - 1)
    order = _packing_order(side)
    return SidePlan(layout, tuple(first.blocks), order, routing, tuple(second.blocks), sets).to(side.device)


def position_sets(side: PackedSide) -> PositionSets | None:
    """Samples that share positions; None where fewer than two do on the average, which is not worth it.

    A token's position embedding is a function of its adaptor, the size of the value and its place (`positions`).
    """
    codes = np.zeros(side.tokens, dtype=np.int64)
    for number, values in enumerate(side.segments):  # one for each adaptor and size
        codes[values.rows.cpu().numpy()] = (number << 32) + values.positions.cpu().numpy()
    counts = np.asarray(side.lengths_cpu, dtype=np.int64)
    numbers, longest = same_prefixes(codes, counts)
    if not _worth_sharing(len(longest), side.samples):
        return None
    starts = np.cumsum(counts) - counts
    rows = np.concatenate([np.arange(starts[sample], starts[sample] + counts[sample]) for sample in longest])
    return PositionSets(tuple(numbers), torch.from_numpy(rows))


def _worth_sharing(sets: int, samples: int) -> bool:
    return 0 < 2 * sets <= samples


class _TermBuilder:
    """One relative term of a side: the blocks of all segments that have it, one after the other in one table."""

    def __init__(self, tokens: int) -> None:
        self.blocks: list[tuple[str, RelativeBlock]] = []
        self._q_coord = torch.zeros(tokens, dtype=torch.int32)
        self._k_coord = torch.zeros(tokens, dtype=torch.int32)
        self._same = torch.zeros(tokens, 2, dtype=torch.int32)
        self._rows = 0

    def add(self, values: AdaptorInput, block: RelativeBlock, queries: Tensor, keys: Tensor) -> None:
        rows = values.rows.cpu()
        self._q_coord[rows] = queries.to(torch.int32) + block.origin(self._rows)
        self._k_coord[rows] = keys.to(torch.int32)
        self._same[rows] = _own_segments(values)
        self.blocks.append((values.adaptor, block))
        self._rows += block.rows

    def term(self) -> RelativeTerm:
        return RelativeTerm(self._q_coord, self._k_coord, self._same, self._rows)


def _misplaced_modality(side: PackedSide) -> Tensor:
    """The modality whose expert OFASys applies to each token.

    It flattens the modalities of the padded batch as [B, T] and the tokens as [T, B], so token (b, t) meets the
    modality of position (t * B + b) mod T. A segment is padded to the width of its longest sample.
    """
    sample, order = side.sample_id.cpu().long(), side.segment_order.cpu().long()
    samples, segments = side.samples, int(order.max()) + 1 if order.numel() else 0
    lengths = torch.zeros(samples * segments, dtype=torch.int64)
    lengths.index_add_(0, sample * segments + order, torch.ones_like(sample))
    lengths = lengths.view(samples, segments)
    widths = lengths.amax(0)
    modality = torch.zeros(segments, dtype=torch.int32).index_copy_(0, order, side.modality_id.cpu())
    column = modality.repeat_interleave(widths)
    padded = torch.arange(column.shape[0]) - (widths.cumsum(0) - widths).repeat_interleave(widths)
    position = torch.arange(column.shape[0]).expand(samples, -1)
    kept = padded < lengths.repeat_interleave(widths, dim=1)
    t = position[kept]
    return column[(t * samples + sample) % max(column.shape[0], 1)]


def plan_cross(
    target: PackedSide,
    source_lengths: tuple[int, ...],
    target_sets: PositionSets | None = None,
    source_sets: PositionSets | None = None,
) -> AttentionLayout:
    """Every target token sees its sample's source tokens. Positions are shared where both sides' are, if it pays."""
    if len(source_lengths) != target.samples:
        raise OfakernValueError(
            f"OFAPlus.decode: side must have as many samples as memory ({len(source_lengths)}), got {target.samples}"
        )
    visible = cross_intervals(target.lengths_cpu, source_lengths)
    sharing: tuple[Sequence[int], Sequence[int]] | tuple[None, None] = (None, None)
    if target_sets is not None and source_sets is not None:
        pairs = set(zip(target_sets.numbers, source_sets.numbers, strict=True))
        if _worth_sharing(len(pairs), target.samples):
            sharing = target_sets.numbers, source_sets.numbers
    layout = AttentionLayout.build(visible, target.lengths_cpu, source_lengths, (), *sharing)
    return layout.to(target.device)


def find_adaptor(adaptors: Mapping[str, Adaptor], values: AdaptorInput) -> Adaptor:
    """Raises OfakernValueError when the model has no adaptor for these values on this side."""
    if values.adaptor not in adaptors:
        raise OfakernValueError(
            f"OFAPlus: adaptor must be one of {sorted(adaptors)} on this side, got {values.adaptor!r}"
        )
    return adaptors[values.adaptor]


def _own_segments(values: AdaptorInput) -> Tensor:
    lengths, starts = values.lengths.cpu(), values.starts.cpu()
    return torch.stack([starts, starts + lengths], dim=1).repeat_interleave(lengths, dim=0)


def _packing_order(side: PackedSide) -> Tensor | None:
    if len(side.segments) < 2:
        return None  # one adaptor fills the rows in their own order
    rows = torch.cat([values.rows.cpu() for values in side.segments])
    return torch.argsort(rows)

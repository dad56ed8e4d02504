"""One decode step as a CUDA graph records it: a fixed number of rows, all inputs in tensors that stay where they are.

Rows beyond the state's are idle: they see no keys, and write into a slot that nobody reads. Every sample is followed
by one without rows that has the rest of its bias columns, so that columns stand where they stood when it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ofakern.model.decode.layer import LayerCaches, StepShape, run_layers
from ofakern.model.decode.lookup import CrossBias, OwnBias
from ofakern.model.decode.past import Past
from ofakern.model.decode.segment import PositionBlock, Segment
from ofakern.model.decode.source import Source
from ofakern.model.decode.weights import DecodeWeights
from ofakern.model.stacks import Decoder
from ofakern.ops.decode_attention import KeyValueCache
from ofakern.ops.staged import Entry

Logits = Callable[[tuple[int, int] | None], Tensor]


class Ending(Protocol):
    """What a graph does with the decoder's output, after all layers; recorded once for every `key`.

    inputs: what it reads, for a graph of so many rows, under names that are not the step's own. run: `hidden` is
    `[rows, D]`, `logits(ids)` `[rows, V]` or those of the ids in a range; `inputs` by name, on the device.
    """

    @property
    def key(self) -> Any: ...
    def inputs(self, rows: int) -> dict[str, Entry]: ...
    def run(self, hidden: Tensor, logits: Logits, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]: ...


class HiddenEnding:
    """The decoder's output itself."""

    key = "hidden"

    def inputs(self, rows: int) -> dict[str, Entry]:
        return {}

    def run(self, hidden: Tensor, logits: Logits, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (hidden,)


@dataclass(frozen=True)
class StepNow:
    """A state before a step, on the host: each row's token int64 `[R]`; of each sample its rows, tokens fed so far
    (int64 `[B]`) and segment."""

    tokens: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    segments: Sequence[Segment]
    past: Past
    source: Source


@dataclass(frozen=True)
class Bounds:
    """What a graph is recorded for. width: of the table of slots. longest: of all sources. places: blocks of positions
    that samples are in. kinds: what rows may write, (adaptor, target slot, expert or None)."""

    rows: int
    width: int
    longest: int
    places: int
    kinds: tuple[tuple[str, int, int | None], ...]


@dataclass(frozen=True)
class Held:
    """What a graph reads and writes beside its inputs."""

    own: Sequence[KeyValueCache]
    source: Sequence[KeyValueCache]
    prefixes: Sequence[KeyValueCache | None]
    own_bias: OwnBias | None
    cross_bias: CrossBias | None


def kind_of(segment: Segment, routed: bool) -> tuple[str, int, int | None]:
    kind = segment.kind
    return kind.adaptor, kind.slot, kind.modality - 1 if routed else None


def step_inputs(
    now: StepNow, blocks: Sequence[PositionBlock], numbers: Sequence[int], bounds: Bounds, held: Held
) -> dict[str, Entry]:
    """Gives every row a slot for its next token. blocks, numbers: each sample's block of positions, and its kind's
    place in `bounds.kinds`."""
    rows, width, positions = bounds.rows, bounds.width, now.positions.tolist()
    fed = np.repeat(now.positions, now.rows)
    slots = now.past.extend(fed, spare=1).numpy()
    assert now.past.caches is held.own, "enough slots have been reserved"
    offsets, counts = _samples(now, rows, width)
    runs = _runs(now.source, rows, held.source[0].room)
    found = {
        "tokens": Entry(now.tokens.astype(np.int32), (rows,)),
        "positions": Entry(fed.astype(np.int32), (rows,)),
        "offsets": Entry(offsets, offsets.shape),
        "counts": Entry(counts, counts.shape),
        "runs": Entry(runs, runs.shape),
        "slots": Entry(slots, (rows,), now.past.spare_slot),
        "table": Entry(now.past.table.numpy()[:, :width], (rows, width)),
    }
    if held.own_bias is not None:
        found["own"] = Entry(held.own_bias.rows(blocks, positions), (rows,))
    if held.cross_bias is not None:
        biases = now.source.biases(now.segments, positions)
        found["cross"] = Entry(held.cross_bias.rows(biases), (held.cross_bias.columns,))
    if len(bounds.kinds) > 1:
        found["kinds"] = Entry(np.repeat(np.array(numbers, np.int32), now.rows), (rows,))
    return found


def _samples(now: StepNow, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 `[2 * rows + 2]` and `[2 * rows + 1]`: where each sample's rows begin, and its keys. Every other one is a
    sample of the state's; the last one has the idle rows."""
    own, rest = slice(0, 2 * len(now.rows), 2), slice(1, 2 * len(now.rows), 2)
    counts, heights = np.zeros(2 * rows + 1, np.int32), np.zeros(2 * rows + 1, np.int64)
    counts[1::2] = width
    counts[own] = now.positions + 1
    counts[rest] -= counts[own]
    heights[own] = now.rows
    heights[-1] = rows - now.rows.sum()
    return np.concatenate([[0], heights.cumsum()]).astype(np.int32), counts


def _runs(source: Source, rows: int, room: int) -> np.ndarray:
    """int32 `[2 * rows + 1, 2]`: the samples' keys; the last sample without rows has the rest of the columns."""
    own = source.caches[0].runs
    assert own is not None
    runs = np.zeros((2 * rows + 1, 2), np.int32)
    runs[0 : 2 * len(own) : 2] = own.numpy()
    runs[-2, 1] = room - runs[:, 1].sum()
    return runs


class DecodeStep:
    """What is recorded; a call runs it. inputs: by name, where every step finds them. segments: one of each kind."""

    def __init__(
        self,
        decoder: Decoder,
        weights: DecodeWeights,
        segments: Sequence[Segment],
        bounds: Bounds,
        held: Held,
        ending: Ending,
        inputs: Mapping[str, Tensor],
        backend: str,
    ) -> None:
        self._decoder, self._weights, self._held, self._bounds = decoder, weights, held, bounds
        self._segments, self._ending, self._inputs, self._backend = tuple(segments), ending, inputs, backend
        source = [cache.standing(inputs["runs"], bounds.longest) for cache in held.source]
        self._caches = [LayerCaches(*each) for each in zip(held.own, source, held.prefixes, strict=True)]
        self._everybody = torch.tensor([0, bounds.rows], dtype=torch.int32).to(inputs["runs"].device)

    def __call__(self) -> tuple[Tensor, ...]:
        held, inputs = self._held, self._inputs
        shape = StepShape(
            row_offsets=inputs["offsets"],
            slots=inputs["slots"],
            table=inputs["table"],
            counts=inputs["counts"],
            cross_bias=None if held.cross_bias is None else held.cross_bias.at(inputs["cross"]),
            everybody=self._everybody,
            experts=self._experts(),
            backend=self._backend,
        )
        own_bias = None if held.own_bias is None else held.own_bias.at(inputs["own"])
        x = run_layers(self._decoder, self._weights, self._caches, shape, own_bias, self._embed())
        hidden = self._decoder.finish(x)

        def logits(ids: tuple[int, int] | None) -> Tensor:
            return (self._weights.output if ids is None else self._weights.output_of(ids))(hidden)

        return self._ending.run(hidden, logits, inputs)

    def _embed(self) -> Tensor:
        """Every kind's embedding of all rows, of which each row takes its own."""
        tokens, positions = self._inputs["tokens"].long(), self._inputs["positions"].long()
        found = [segment.embed(tokens, positions) for segment in self._segments]
        x = found[0]
        for number, other in enumerate(found[1:], 1):
            x = torch.where((self._inputs["kinds"] == number)[:, None], other, x)
        return x

    def _experts(self) -> list[tuple[int, Tensor]]:
        """Which rows are each expert's own, bool `[rows, 1]`."""
        masks: dict[int, Tensor] = {}
        for number, (_, _, expert) in enumerate(self._bounds.kinds):
            if expert is not None:
                mine = self._inputs["kinds"] == number if len(self._segments) > 1 else self._everybody
                masks[expert] = masks[expert] | mine[:, None] if expert in masks else mine[:, None]
        return list(masks.items())

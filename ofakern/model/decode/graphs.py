"""Decode steps as CUDA graphs: which graph a step takes, when one is recorded, and whose memory they stand in.

A graph is recorded for a number of rows, a width of the table of slots, the kinds of segments, an ending and, since it
knows their addresses, one set of caches: a `Room`. A model's weights keep a few rooms; a state takes a free one with
its first step and leaves it to the next state, which then finds the graphs of the one before.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ofakern.model.decode.lookup import CrossBias, OwnBias
from ofakern.model.decode.past import Past
from ofakern.model.decode.recorded import Bounds, DecodeStep, Ending, Held, StepNow, kind_of, step_inputs
from ofakern.model.decode.segment import PositionBlock, Segment
from ofakern.model.decode.source import Source
from ofakern.model.decode.weights import DecodeWeights
from ofakern.model.stacks import Decoder
from ofakern.ops.decode_attention import KeyValueCache
from ofakern.ops.graph import Recorder, StepGraph, recorder_for
from ofakern.ops.graph_use import GraphUse
from ofakern.ops.staged import Entry, Staged

#: Rows that graphs are recorded for.
ROWS = (1, 2, 4, *range(8, 65, 8), *range(96, 257, 32))
LEAST_WIDTH = 64
_ROOMS = 4
_GRAPHS = 16  # of a room
_leasing = threading.Lock()


@dataclass(frozen=True)
class _Recorded:
    staged: Staged
    held: Held
    graph: StepGraph[tuple[Tensor, ...]]


class Room:
    """The caches of one running state, and the graphs that know their addresses.

    A state is the owner as long as it lives. Biases are kept by the graphs that read them.
    """

    def __init__(self, device: torch.device) -> None:
        self.recorder: Recorder = recorder_for(device, "begin_decode(cuda_graphs=True)")
        self.graphs: OrderedDict[Any, _Recorded] = OrderedDict()
        self._own: list[KeyValueCache] = []
        self._source: list[KeyValueCache] = []
        self._owner: weakref.ref[Graphs] | None = None
        self._biases: weakref.WeakValueDictionary[Any, OwnBias | CrossBias] = weakref.WeakValueDictionary()

    @property
    def free(self) -> bool:
        return self._owner is None or self._owner() is None

    def take(self, owner: Graphs, now: StepNow) -> None:
        """From now on the state's keys stand here."""
        self._owner = weakref.ref(owner)
        if self._own:
            now.past.settle(now.positions.repeat(now.rows), self._own)
            now.source.settle(self._source)

    def follow(self, past: Past, source: Source) -> None:
        """Graphs that know addresses which the state's caches no longer have are dropped."""
        same = self._own and past.caches[0].keys is self._own[0].keys
        if not same or source.caches[0].keys is not self._source[0].keys:
            self.graphs.clear()
            self._own, self._source = past.caches, [cache.select([]) for cache in source.caches]

    def own_bias(self, block: PositionBlock, bounds: Bounds) -> OwnBias | None:
        """Where biases like the block's stand for graphs of these bounds; None: there are none."""
        if block.own is None:
            return None
        key = bounds.places, bounds.width
        found = self._biases.get(key)
        if found is None:
            found = self._biases[key] = OwnBias(block.own, *key)
        assert isinstance(found, OwnBias)
        return found

    def cross_bias(self, block: PositionBlock, columns: int) -> CrossBias | None:
        if block.cross is None:
            return None
        found = self._biases.get(columns)
        if found is None:
            found = self._biases[columns] = CrossBias(block.cross, columns)
        assert isinstance(found, CrossBias)
        return found


class Graphs:
    """How one state's steps run; use: what has run. Raises OfakernValueError where nothing records graphs.

    prefixes: learned keys of each layer or None. backend: of `decode_attention`.
    """

    def __init__(
        self,
        decoder: Decoder,
        weights: DecodeWeights,
        prefixes: Sequence[KeyValueCache | None],
        device: torch.device,
        backend: str,
    ) -> None:
        recorder_for(device, "begin_decode(cuda_graphs=True)")
        self.use = GraphUse()
        self._decoder, self._weights, self._device, self._backend = decoder, weights, device, backend
        self._prefixes = prefixes
        self._room: Room | None = None
        self._rows, self._places = 0, 2

    def step(self, now: StepNow, ending: Ending) -> tuple[Tensor, ...] | None:
        """The ending's results, which the next step overwrites; None, and nothing has been fed, without a graph."""
        if (reason := self._why_not(now)) is not None:
            self.use.without[reason] += 1
            return None
        positions = now.positions.tolist()
        blocks = [segment.block(position) for segment, position in zip(now.segments, positions, strict=True)]
        room, bounds = self._room, self._bounds(now, blocks)
        assert room is not None
        now.past.reserve(_slots(bounds))
        room.follow(now.past, now.source)
        held = self._held(room, now, bounds, blocks)
        numbers = [bounds.kinds.index(self._kind(segment)) for segment in now.segments]
        inputs = step_inputs(now, blocks, numbers, bounds, held) | ending.inputs(bounds.rows)
        key = bounds, ending.key
        recorded = room.graphs.get(key)
        if recorded is None:
            recorded = room.graphs[key] = self._record(room, now, bounds, held, ending, inputs)
            if len(room.graphs) > _GRAPHS:
                room.graphs.popitem(last=False)
        else:
            recorded.staged.send(inputs)
            room.graphs.move_to_end(key)
        self.use.replayed += 1
        return recorded.graph.replay()

    def _why_not(self, now: StepNow) -> str | None:
        rows = len(now.tokens)
        if not 0 < rows <= ROWS[-1]:
            return f"graphs have 1 to {ROWS[-1]} rows, the step had {rows}"
        if now.segments[0].token_shape:
            return "it writes frames, not tokens"
        if self._room is None:
            self._room = self._lease(now)
        return None if self._room is not None else f"{_ROOMS} other states of the model have all the memory for graphs"

    def _lease(self, now: StepNow) -> Room | None:
        rooms = self._weights.rooms
        with _leasing:
            free: Room | None = next((room for room in rooms if room.free), None)
            if free is None and len(rooms) < _ROOMS:
                free = Room(self._device)
                rooms.append(free)
            if free is not None:
                free.take(self, now)
        return free

    def _bounds(self, now: StepNow, blocks: Sequence[PositionBlock]) -> Bounds:
        runs = now.source.caches[0].runs
        assert runs is not None
        self._rows = size_for(len(now.tokens), self._rows)
        self._places = max(self._places, len({id(block) for block in blocks}))
        return Bounds(
            self._rows,
            power_of_two(int(now.positions.max()) + 1),
            power_of_two(int(runs[:, 1].max())),
            1 << (self._places - 1).bit_length(),
            tuple(sorted({self._kind(segment) for segment in now.segments}, key=str)),
        )

    def _kind(self, segment: Segment) -> tuple[str, int, int | None]:
        return kind_of(segment, self._decoder.config.modal_ffn)

    def _held(self, room: Room, now: StepNow, bounds: Bounds, blocks: Sequence[PositionBlock]) -> Held:
        own, source = now.past.caches, now.source.caches
        own_bias, cross_bias = room.own_bias(blocks[0], bounds), room.cross_bias(blocks[0], source[0].room)
        return Held(own, source, self._prefixes, own_bias, cross_bias)

    def _record(
        self, room: Room, now: StepNow, bounds: Bounds, held: Held, ending: Ending, inputs: dict[str, Entry]
    ) -> _Recorded:
        staged = Staged(inputs, self._device)
        staged.send(inputs)  # it is run before it is recorded
        segments = {self._kind(segment): segment for segment in now.segments}
        kinds = [segments[kind] for kind in bounds.kinds]
        step = DecodeStep(self._decoder, self._weights, kinds, bounds, held, ending, staged.tensors, self._backend)
        recorded = _Recorded(staged, held, StepGraph(step, room.recorder, name="a decode step"))
        self.use.recorded += 1
        return recorded


def size_for(rows: int, before: int) -> int:
    """Rows of the graph for `rows` rows after one of `before`: idle rows cost less than recording another graph."""
    size = next(size for size in ROWS if size >= rows)
    return before if size <= before < 4 * size else size


def power_of_two(count: int) -> int:
    """The next one, `LEAST_WIDTH` at least: of numbers of keys, so that few graphs serve all lengths."""
    return max(LEAST_WIDTH, 1 << (count - 1).bit_length())


def _slots(bounds: Bounds) -> int:
    """Enough for rows that share nothing, of which a third is free again whenever slots are looked for."""
    return bounds.rows * bounds.width * 3 // 2

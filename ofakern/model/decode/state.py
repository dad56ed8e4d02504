"""The decoder's state for the rows of a batch of samples, which may come, multiply, change places and leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.model.decode.graphs import Graphs
from ofakern.model.decode.layer import LayerCaches, StepShape, run_layers
from ofakern.model.decode.native import whole_step
from ofakern.model.decode.past import Past
from ofakern.model.decode.recorded import Ending, HiddenEnding, StepNow
from ofakern.model.decode.segment import Segment, SegmentKind
from ofakern.model.decode.source import Source
from ofakern.model.decode.weights import DecodeWeights
from ofakern.model.stacks import Decoder, Memory
from ofakern.ops.decode_attention import KeyValueCache
from ofakern.ops.decode_layers import decode_layers
from ofakern.ops.graph_use import GraphUse


class DecodeState:
    """The state of `rows` hypotheses; rows of one sample stand together, in the samples' order, at one position.

    Opaque: callers use `rows`, `rows_of_sample`, `positions`, `length`, `reorder`, `rewind`, `join`, `step` and, of
    CUDA graphs, `replay` and `graph_use`. weights: those that the model had when it began. All of it runs in inference
    mode.
    """

    @torch.inference_mode()
    def __init__(
        self,
        decoder: Decoder,
        weights: DecodeWeights,
        memory: Memory,
        rows_per_sample: int | Sequence[int],
        kind: SegmentKind,
        cuda_graphs: bool = False,
    ) -> None:
        counts = [rows_per_sample] * memory.samples if isinstance(rows_per_sample, int) else list(rows_per_sample)
        if len(counts) != memory.samples or min(counts, default=0) < 0 or kind.max_length < 1:
            raise OfakernValueError(
                f"OFAPlus.begin_decode: rows_per_sample must be a count or {memory.samples} counts and max_length at "
                f"least 1, got {rows_per_sample} and {kind.max_length}"
            )
        self.weights = weights
        self._decoder = decoder
        self._device = memory.states.device
        # A graph cannot hold what `auto` may take on a GPU: the reference reads its tables on the host.
        self._backend = "cuda" if cuda_graphs and self._device.type == "cuda" else decoder.backend
        segment = Segment(decoder, kind)
        self._segments = [segment] * memory.samples
        self._token_shape = segment.token_shape
        self._rows = np.array(counts, dtype=np.int64)
        self._positions = np.zeros(memory.samples, dtype=np.int64)
        layers, weight = decoder.decoder_layers(), decoder.adaptor.embed_tokens.weight
        self._dtype = weight.dtype
        with torch.autocast(self._device.type, enabled=False):
            self._source = Source(decoder, weights, memory.to(weight.dtype), self._backend)
            self._prefixes = _prefix_caches(decoder, weight.dtype, self._backend)
        config = decoder.config
        width = config.dim // config.heads

        def empty(slots: int) -> KeyValueCache:
            return KeyValueCache.empty(slots, config.heads, width, width, weight.dtype, device=self._device)

        self._past = Past(sum(counts), len(layers), kind.max_length, empty)
        self._graphs = Graphs(decoder, weights, self._prefixes, self._device, self._backend) if cuda_graphs else None
        self._keep(self._rows > 0)

    @property
    def rows(self) -> int:
        return int(self._rows.sum())

    @property
    def rows_of_sample(self) -> list[int]:
        """Of the samples that still have rows, in their order."""
        found: list[int] = self._rows.tolist()
        return found

    @property
    def graph_use(self) -> GraphUse:
        """What ran as CUDA graphs, and why the rest did not."""
        return GraphUse() if self._graphs is None else self._graphs.use

    @property
    def positions(self) -> Tensor:
        """Tokens fed so far, int64 `[rows]`."""
        return torch.from_numpy(np.repeat(self._positions, self._rows))

    @property
    def length(self) -> int:
        """The most tokens that a row has been fed."""
        return int(self._positions.max(initial=0))

    @torch.inference_mode()
    def reorder(self, index: Tensor) -> None:
        """Row r becomes what row `index[r]` was. index: int64 `[rows']`, a sample's rows kept together and in order.

        rows' may be smaller (finished samples leave for good) or larger. Only the table of slots moves.
        """
        wanted = index.cpu().numpy()
        sample = np.repeat(np.arange(len(self._rows)), self._rows)
        if wanted.size and not (0 <= wanted.min() and wanted.max() < len(sample)):
            raise OfakernValueError(
                f"DecodeState.reorder: index must be in [0, {len(sample) - 1}] (the rows), got {wanted.tolist()}"
            )
        sample = sample[wanted]
        if (np.diff(sample) < 0).any():
            raise OfakernValueError(
                "DecodeState.reorder: index must keep the samples' rows together and in order, "
                f"got samples {sample.tolist()}"
            )
        self._past.select(torch.from_numpy(wanted))
        rows = np.bincount(sample, minlength=len(self._rows))
        if not np.array_equal(rows, self._rows):
            self._rows = rows
            self._keep(rows > 0)

    def rewind(self, length: int) -> None:
        """Forgets what rows were fed after their first `length` tokens."""
        if length < 0:
            raise OfakernValueError(f"DecodeState.rewind: length must be at least 0, got {length}")
        self._positions = np.minimum(self._positions, length)

    @torch.inference_mode()
    def join(self, other: DecodeState) -> None:
        """The other's samples come after ours, each where it stands; the other is of no use afterwards.

        Keys are copied once. The other may write another kind of segment, of tokens of one shape.
        """
        if not isinstance(other, DecodeState):
            raise OfakernTypeError(f"DecodeState.join: other must be a DecodeState, got {type(other).__name__}")
        if other is self or other.weights is not self.weights:
            raise OfakernValueError("DecodeState.join: other must be another state of the same weights, got another's")
        if other._token_shape != self._token_shape:
            raise OfakernValueError("DecodeState.join: other must write tokens of the same shape, got another")
        self._past.join(self._counts(), other._past, other._counts())
        self._source.join(other._source)
        known = {segment.kind: segment for segment in self._segments}
        self._segments = [*self._segments, *(known.setdefault(s.kind, s) for s in other._segments)]
        if self._graphs is not None and other._graphs is not None:
            self._graphs.use += other._graphs.use
        self._rows = np.concatenate([self._rows, other._rows])
        self._positions = np.concatenate([self._positions, other._positions])
        self._keep(self._rows > 0)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """tokens int64 `[rows]` (frames `[rows, F]`), each at its next position; the decoder's output `[rows, D]`."""
        wanted = [self.rows, *self._token_shape]
        if list(tokens.shape) != wanted:
            raise OfakernValueError(
                f"OFAPlus.decode_step: tokens must have shape {wanted} (the rows), got {list(tokens.shape)}"
            )
        self._refuse_more_than_fits()
        if self._graphs is not None:
            found = self._replayed(tokens, HiddenEnding())
            if found is not None:
                return found[0][: len(tokens)].clone()  # which the next step overwrites
        # The weights' dtype, whatever autocast would make of it: they are packed in that.
        with torch.autocast(self._device.type, enabled=False):
            return self._step(tokens.to(self._device, non_blocking=True))

    @torch.inference_mode()
    def replay(self, tokens: Tensor, ending: Ending) -> tuple[Tensor, ...] | None:
        """A step as one CUDA graph that goes on with `ending`; tokens int64 `[rows]`, on the CPU.

        Returns the ending's results, of more rows than there are; the next step overwrites them. None, and nothing has
        been fed, where the step cannot be a graph: `graph_use` tells why.
        """
        self._refuse_more_than_fits()
        return self._replayed(tokens, ending) if self._graphs is not None else None

    def _replayed(self, tokens: Tensor, ending: Ending) -> tuple[Tensor, ...] | None:
        assert self._graphs is not None
        now = StepNow(tokens.cpu().numpy(), self._rows, self._positions, self._segments, self._past, self._source)
        with torch.autocast(self._device.type, enabled=False):
            found = self._graphs.step(now, ending)
        if found is not None:
            self._advance()
        return found

    def _refuse_more_than_fits(self) -> None:
        for group in self._groups:
            fed, most = int(self._positions[group.samples].max()), group.segment.kind.max_length
            if fed >= most:
                raise OfakernValueError(
                    f"OFAPlus.decode_step: max_length ({most}) must exceed the tokens fed, got {fed}"
                )

    def _step(self, tokens: Tensor) -> Tensor:
        x, shape, own_bias = self._embed(tokens), self._shape(), self._own_bias()
        experts = tuple(expert for expert, _ in shape.experts)
        prepared = whole_step(self._decoder, self.weights, len(x), experts)
        if prepared is None:
            caches = list(map(LayerCaches, self._past.caches, self._source.caches, self._prefixes))
            out = self._decoder.finish(run_layers(self._decoder, self.weights, caches, shape, own_bias, x))
        else:
            out = decode_layers(
                x,
                prepared,
                self._past.caches,
                self._source.caches,
                shape.row_offsets,
                shape.slots,
                shape.table,
                shape.counts,
                own_bias=own_bias,
                cross_bias=shape.cross_bias,
            )
        self._advance()
        return out

    def _advance(self) -> None:
        self._positions += 1
        for group in self._groups:
            group.segment.forget_before(int(self._positions[group.samples].min()))

    def _embed(self, tokens: Tensor) -> Tensor:
        positions = self.positions.to(self._device, non_blocking=True)
        if len(self._groups) == 1:
            return self._groups[0].segment.embed(tokens, positions)
        parts = [group.segment.embed(tokens[group.rows], positions[group.rows]) for group in self._groups]
        if not parts:
            return tokens.new_empty((0, self._decoder.config.dim), dtype=self._dtype)
        return torch.cat(parts)[torch.argsort(torch.cat([group.rows for group in self._groups]))]

    def _shape(self) -> StepShape:
        """Gives every row a slot for its next token."""
        slots = self._past.extend(self._counts())
        counts = torch.from_numpy((self._positions + 1).astype(np.int32))
        tables = (self._offsets, slots, self._past.table[:, : self.length + 1], counts, self._everybody)
        # Once for all layers, and without waiting for a GPU.
        offsets, slots, table, counts, everybody = (x.to(self._device, non_blocking=True) for x in tables)
        return StepShape(
            offsets,
            slots,
            table,
            counts,
            self._source.bias(self._segments, self._positions.tolist()),
            everybody,
            self._experts,
            self._backend,
        )

    def _own_bias(self) -> Tensor | None:
        """f32 `[layers, H, sum of counts]`."""
        rows = []
        for segment, position in zip(self._segments, self._positions.tolist(), strict=True):
            block = segment.block(position)
            if block.own is None:
                return None
            rows.append(block.own[position - block.start, :, :, : position + 1])
        return torch.cat(rows, 2) if rows else None

    def _counts(self) -> np.ndarray:
        """Tokens fed to each row."""
        counts: np.ndarray = np.repeat(self._positions, self._rows)
        return counts

    def _keep(self, samples: np.ndarray) -> None:
        """Only these samples stay, bool `[B]`; what follows from who is there is made anew."""
        if not samples.all():
            self._source.keep(samples)
            self._segments = [segment for segment, kept in zip(self._segments, samples, strict=True) if kept]
            self._rows, self._positions = self._rows[samples], self._positions[samples]
        offsets = np.concatenate([[0], np.cumsum(self._rows)]).astype(np.int32)
        self._offsets = torch.from_numpy(offsets)
        self._everybody = torch.tensor([0, self.rows], dtype=torch.int32)
        self._groups = [self._group(segment) for segment in dict.fromkeys(self._segments)]
        self._experts = self._route() if self._decoder.config.modal_ffn else []

    def _group(self, segment: Segment) -> _Group:
        own = np.array([one is segment for one in self._segments])
        rows = torch.from_numpy(np.flatnonzero(np.repeat(own, self._rows)))
        return _Group(segment, np.flatnonzero(own), rows.to(self._device))

    def _route(self) -> list[tuple[int, Tensor]]:
        """Each expert's rows: a segment's modality has its own."""
        found: dict[int, list[Tensor]] = {}
        for group in self._groups:
            found.setdefault(group.segment.kind.modality - 1, []).append(group.rows)
        return [(expert, torch.cat(rows)) for expert, rows in found.items()]


@dataclass(frozen=True)
class _Group:
    """What writes the same kind of segment: its samples, and their rows (int64)."""

    segment: Segment
    samples: np.ndarray
    rows: Tensor


def _prefix_caches(decoder: Decoder, dtype: torch.dtype, backend: str) -> list[KeyValueCache | None]:
    """Each layer's learned keys, one run that all rows see."""
    prompt = decoder.decoder_prompt_encoder
    if prompt is None:
        return [None] * len(decoder.layers)
    return [KeyValueCache.of_source(k.to(dtype), v.to(dtype), [prompt.length], backend=backend) for k, v in prompt()]

"""Incremental decoding: one token per row and step, over a straightforward key-value cache.

The cache's layout is this module's own. Keys of a row stand in a run of `capacity` slots, of which step t sees the
first t + 1; the coordinates are those of the full forward pass. The capacity doubles when it is used up, so short
answers neither allocate nor (when beams change places) copy room for the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.model.stacks import Decoder, Memory, prefixes_of
from ofakern.nn.adaptor import TokenAdaptor
from ofakern.nn.attention import Positions
from ofakern.nn.experts import Routing
from ofakern.ops.attention import AttentionLayout, RelativeTerm
from ofakern.ops.attention.intervals import cross as cross_intervals

FIRST_CAPACITY = 16


@dataclass(frozen=True)
class _Step:
    """The tokens of one step as an adaptor sees them: segments of which only position t is here."""

    value: Tensor
    lengths: Tensor
    positions: Tensor
    partial: bool = False
    levels: Tensor | None = None


class DecodeState:
    """The decoder's state for `rows` hypotheses; rows of one sample stand together, in the samples' order.

    Opaque: callers use `rows`, `length` (tokens fed so far), `max_length` and `reorder`.
    """

    def __init__(
        self,
        decoder: Decoder,
        memory: Memory,
        rows_per_sample: int | Sequence[int],
        max_length: int,
        target_slot: int,
        modality: int = 1,
        adaptor_name: str = "text",
    ) -> None:
        counts = [rows_per_sample] * memory.samples if isinstance(rows_per_sample, int) else list(rows_per_sample)
        if len(counts) != memory.samples or min(counts, default=0) < 0 or max_length < 1:
            raise OfakernValueError(
                f"OFAPlus.begin_decode: rows_per_sample must be a count or {memory.samples} counts and max_length at "
                f"least 1, got {rows_per_sample} and {max_length}"
            )
        adaptor = decoder.adaptor.adaptors.get(adaptor_name)
        if not isinstance(adaptor, TokenAdaptor):
            known = sorted(n for n, a in decoder.adaptor.adaptors.items() if isinstance(a, TokenAdaptor))
            raise OfakernValueError(f"OFAPlus.begin_decode: adaptor must be one of {known}, got {adaptor_name!r}")
        self.max_length = max_length
        self.length = 0
        self.target_slot = target_slot
        self.modality = modality
        self._decoder = decoder
        self._adaptor = adaptor
        self._source_lengths = memory.lengths
        self._sample = np.repeat(np.arange(memory.samples), counts)
        self._device = memory.states.device
        relative = decoder.config.use_self_attn_bias
        block = adaptor.block_of_length(max_length, causal=True).to(self._device) if relative else None
        self._tables = decoder.adaptor.tables([(adaptor_name, block)] if block is not None else [])
        self._rows = block.rows if block is not None else 0
        self._q_coord, self._k_coord = (c.to(torch.int32) for c in adaptor.step_coordinates(max_length))
        self._source = [layer.encoder_attn.keys_values(memory.states) for layer in decoder.decoder_layers()]
        self._source_k_pos = decoder.cross_keys(memory)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._k_pos: Tensor | None = None
        self._capacity = min(FIRST_CAPACITY, max_length)
        self._cross_layout = self._plan_cross()

    @property
    def rows(self) -> int:
        return len(self._sample)

    def reorder(self, index: Tensor) -> None:
        """Row r becomes what row `index[r]` was. index: int64 `[rows']`, a sample's rows kept together and in order.

        rows' may be smaller (finished samples leave) or larger.
        """
        sample = self._sample[index.cpu().numpy()]
        if (np.diff(sample) < 0).any():
            raise OfakernValueError(
                "DecodeState.reorder: index must keep the samples' rows together and in order, "
                f"got samples {sample.tolist()}"
            )
        device_index = index.to(self._device)
        self._keys = [cache.index_select(0, device_index) for cache in self._keys]
        self._values = [cache.index_select(0, device_index) for cache in self._values]
        if self._k_pos is not None:
            self._k_pos = self._k_pos.index_select(0, device_index)
        if not np.array_equal(sample, self._sample):
            self._sample = sample
            self._cross_layout = self._plan_cross()

    def step(self, tokens: Tensor) -> Tensor:
        """tokens int64 `[rows]` (frames `[rows, F]`) at the next position; returns the decoder's output `[rows, D]`."""
        wanted = [self.rows, *self._adaptor.step_shape]
        if list(tokens.shape) != wanted:
            raise OfakernValueError(
                f"OFAPlus.decode_step: tokens must have shape {wanted} (the rows), got {list(tokens.shape)}"
            )
        if self.length >= self.max_length:
            raise OfakernValueError(
                f"OFAPlus.decode_step: max_length ({self.max_length}) must exceed the tokens fed, got {self.length}"
            )
        if self.length == self._capacity:
            self._grow()
        decoder = self._decoder
        x, positions = self._embed(tokens)
        q_pos, k_pos = decoder.adaptor.factored(positions)
        prompt, layers = decoder.decoder_prompt_encoder, decoder.decoder_layers()
        prefixes, prefix_layout = prefixes_of(prompt, self.rows, len(layers), self._device)
        keys = self._remember_positions(k_pos)
        own = Positions(self._plan_self(), q_pos, keys, decoder.backend, prefix_layout)
        cross = Positions(self._cross_layout, decoder.cross_queries(positions), self._source_k_pos, decoder.backend)
        # Every row continues the same slot, so one expert takes them all.
        routing = Routing(None, ((self.modality - 1, self.rows),)) if decoder.config.modal_ffn else None
        for number, layer in enumerate(layers):
            k, v = layer.self_attn.keys_values(layer.self_input(x))
            own_keys = self._remember(number, k, v)
            source, tables = self._source[number], self._tables[number]
            x = layer(x, own, cross, source, tables, own_keys, routing=routing, prefix=prefixes[number])
        self.length += 1
        return decoder.finish(x)

    def _embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        group = self._decoder.adaptor
        lengths = torch.ones(self.rows, dtype=torch.int32)
        step = _Step(tokens.to(self._device), lengths, torch.full((self.rows,), self.length, device=self._device))
        embed, positions = self._adaptor(step, group.embed_tokens)
        if group.order_embedding is not None:
            embed = embed + group.order_embedding.weight[self.target_slot]
        return embed, positions

    def _plan_self(self) -> AttentionLayout:
        """Row r sees slots r * capacity .. r * capacity + t."""
        rows, t, slots = self.rows, self.length, self._capacity
        lo = torch.arange(rows, dtype=torch.int32) * slots
        visible = torch.stack([lo, lo + t + 1], dim=1)
        terms = []
        if self._rows:
            q_coord, k_coord = self._q_coord[t].repeat(rows), self._k_coord[:slots].repeat(rows)
            terms = [RelativeTerm(q_coord, k_coord, visible, self._rows)]
        return AttentionLayout.build(visible, [1] * rows, [slots] * rows, terms).to(self._device)

    def _plan_cross(self) -> AttentionLayout:
        counts = np.bincount(self._sample, minlength=len(self._source_lengths)).tolist()
        visible = cross_intervals(counts, self._source_lengths)
        return AttentionLayout.build(visible, counts, self._source_lengths).to(self._device)

    def _remember_positions(self, k_pos: Tensor | None) -> Tensor | None:
        if k_pos is None:
            return None
        if self._k_pos is None:
            self._k_pos = self._empty(k_pos)
        self._k_pos[:, self.length] = k_pos
        return self._k_pos.flatten(0, 1)

    def _remember(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if len(self._keys) == layer:
            self._keys.append(self._empty(k))
            self._values.append(self._empty(v))
        self._keys[layer][:, self.length] = k
        self._values[layer][:, self.length] = v
        return self._keys[layer].flatten(0, 1), self._values[layer].flatten(0, 1)

    def _empty(self, like: Tensor) -> Tensor:
        # Slots beyond the current step are never read (no query sees them), so they need no value.
        return like.new_empty((self.rows, self._capacity, *like.shape[1:]))

    def _grow(self) -> None:
        room = min(self._capacity, self.max_length - self._capacity)
        self._capacity += room
        self._keys = [_with_room(cache, room) for cache in self._keys]
        self._values = [_with_room(cache, room) for cache in self._values]
        if self._k_pos is not None:
            self._k_pos = _with_room(self._k_pos, room)


def _with_room(cache: Tensor, slots: int) -> Tensor:
    return torch.cat([cache, cache.new_empty((cache.shape[0], slots, *cache.shape[2:]))], dim=1)

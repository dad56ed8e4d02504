"""The encoder's keys and values of all layers, once per sample, and what positions add to cross attention's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ofakern.model.decode.segment import PositionBlock, Segment
from ofakern.model.decode.weights import DecodeWeights, LayerWeights
from ofakern.model.stacks import Decoder, Memory
from ofakern.nn.attention import MultiheadAttention
from ofakern.ops.decode_attention import KeyValueCache

#: Of a sample: what the positions of its block add to scores, f32 `[n, H, S or more]`, the row of its position, and S.
SampleBias = tuple[Tensor, int, int]


@dataclass
class _Keys:
    """Positions that some samples share. k_pos `[S, H, P]`: None without a factored term. bias: f32 `[n, H, S]` of the
    positions of `block`."""

    k_pos: Tensor | None
    block: PositionBlock | None = None
    bias: Tensor | None = None

    def bias_at(self, segment: Segment, position: int) -> Tensor:
        """f32 `[H, S]`; samples that share positions stand at one position of one segment."""
        bias, row = self.biases_at(segment, position)
        return bias[row]

    def biases_at(self, segment: Segment, position: int) -> tuple[Tensor, int]:
        """f32 `[n, H, S]` of the position's block, and its row in it."""
        block = segment.block(position)
        if self.block is not block:
            self.block, self.bias = block, _bias(block, self.k_pos)
        assert self.bias is not None
        return self.bias, position - block.start


class Source:
    """caches: one per decoder layer. Samples come and go."""

    def __init__(self, decoder: Decoder, weights: DecodeWeights, memory: Memory, backend: str) -> None:
        self.caches = [
            _cache(layer.encoder_attn, own, memory, backend)
            for layer, own in zip(decoder.decoder_layers(), weights.layers, strict=True)
        ]
        self._samples = list(zip(_keys(decoder, memory), memory.lengths, strict=True))

    def bias(self, segments: Sequence[Segment], positions: Sequence[int]) -> Tensor | None:
        """What this step adds to the scores of all layers, f32 `[H, sum of S]`: sample b is at position `positions[b]`
        of `segments[b]`. None: nothing."""
        if not self._samples or self._samples[0][0].k_pos is None:
            return None
        rows = [
            keys.bias_at(segment, position)[:, :length]
            for (keys, length), segment, position in zip(self._samples, segments, positions, strict=True)
        ]
        return torch.cat(rows, 1)

    def biases(self, segments: Sequence[Segment], positions: Sequence[int]) -> list[SampleBias]:
        """The same before it is looked up, of a decoder that has it."""
        return [
            (*keys.biases_at(segment, position), length)
            for (keys, length), segment, position in zip(self._samples, segments, positions, strict=True)
        ]

    def settle(self, caches: Sequence[KeyValueCache]) -> None:
        """The keys are copied into these caches of no samples, or moved to where there is room for them."""
        self.caches = [cache.joined(own) for cache, own in zip(caches, self.caches, strict=True)]

    def keep(self, samples: np.ndarray) -> None:
        """Only these samples stay, bool `[B]`."""
        self._samples = [sample for sample, kept in zip(self._samples, samples, strict=True) if kept]
        self.caches = [cache.select(np.flatnonzero(samples).tolist()) for cache in self.caches]

    def join(self, other: Source) -> None:
        """The other's samples come after ours."""
        self._samples += other._samples
        self.caches = [mine.joined(cache) for mine, cache in zip(self.caches, other.caches, strict=True)]


def _cache(attention: MultiheadAttention, weights: LayerWeights, memory: Memory, backend: str) -> KeyValueCache:
    if weights.source.packs and backend in ("auto", "cpu"):
        return KeyValueCache.of_projection(memory.states, weights.source.packed(), memory.lengths, attention.heads)
    return KeyValueCache.of_source(*attention.source_keys_values(memory.states), memory.lengths, backend=backend)


def _keys(decoder: Decoder, memory: Memory) -> list[_Keys]:
    """Of each sample; those that share positions share what is made of them."""
    sets = memory.sets
    numbers = range(memory.samples) if sets is None else sets.numbers
    lengths: dict[int, int] = {}
    for number, length in zip(numbers, memory.lengths, strict=True):
        lengths[number] = max(lengths.get(number, 0), length)
    k_pos = decoder.cross_keys(memory.positions if sets is None else sets.take(memory.positions))
    ordered = sorted(lengths)
    parts = [None] * len(ordered) if k_pos is None else torch.split(k_pos, [lengths[number] for number in ordered])
    made = {number: _Keys(part) for number, part in zip(ordered, parts, strict=True)}
    return [made[number] for number in numbers]


def _bias(block: PositionBlock, k_pos: Tensor | None) -> Tensor:
    """f32 `[n, H, S]`: products of rounded projections in float32, as the attention op makes them."""
    assert block.cross is not None and k_pos is not None
    keys = k_pos.to(block.cross.dtype).permute(1, 2, 0)
    return torch.bmm(block.cross, keys).transpose(0, 1).contiguous()

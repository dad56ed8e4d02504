"""The encoder's keys and values of all layers, once per sample, and what positions add to cross attention's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ofakern.model.decode.segment import PositionBlock, Segment
from ofakern.model.stacks import Decoder, Memory
from ofakern.ops.decode_attention import KeyValueCache


@dataclass
class _Sample:
    """k_pos `[S, H, P]`: None without a factored term. bias: f32 `[n, H, S]` of the positions of `block`."""

    k_pos: Tensor | None
    block: PositionBlock | None = None
    bias: Tensor | None = None


class Source:
    """caches: one per decoder layer. Samples come and go."""

    def __init__(self, decoder: Decoder, memory: Memory) -> None:
        self.caches = [
            KeyValueCache.of_source(
                *layer.encoder_attn.source_keys_values(memory.states), memory.lengths, backend=decoder.backend
            )
            for layer in decoder.decoder_layers()
        ]
        k_pos = decoder.cross_keys(memory)
        parts: Sequence[Tensor | None] = (
            [None] * memory.samples if k_pos is None else torch.split(k_pos, list(memory.lengths))
        )
        self._samples = [_Sample(part) for part in parts]

    def bias(self, segments: Sequence[Segment], positions: Sequence[int]) -> Tensor | None:
        """What this step adds to the scores of all layers, f32 `[H, sum of S]`: sample b is at position `positions[b]`
        of `segments[b]`. None: nothing."""
        if not self._samples or self._samples[0].k_pos is None:
            return None
        rows = []
        for sample, segment, position in zip(self._samples, segments, positions, strict=True):
            block = segment.block(position)
            if sample.block is not block:
                sample.block, sample.bias = block, _bias(block, sample.k_pos)
            assert sample.bias is not None
            rows.append(sample.bias[position - block.start])
        return torch.cat(rows, 1)

    def keep(self, samples: np.ndarray) -> None:
        """Only these samples stay, bool `[B]`."""
        self._samples = [sample for sample, kept in zip(self._samples, samples, strict=True) if kept]
        self.caches = [cache.select(np.flatnonzero(samples).tolist()) for cache in self.caches]

    def join(self, other: Source) -> None:
        """The other's samples come after ours."""
        self._samples += other._samples
        self.caches = [mine.joined(cache) for mine, cache in zip(self.caches, other.caches, strict=True)]


def _bias(block: PositionBlock, k_pos: Tensor | None) -> Tensor:
    """f32 `[n, H, S]`: products of rounded projections in float32, as the attention op makes them."""
    assert block.cross is not None and k_pos is not None
    keys = k_pos.to(block.cross.dtype).permute(1, 2, 0)
    return torch.bmm(block.cross, keys).transpose(0, 1).contiguous()

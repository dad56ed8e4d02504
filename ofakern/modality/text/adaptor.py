"""The text adaptor: token ids (text, boxes and other tokenised slots) to embeddings, positions and log buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ofakern.nn.adaptor import Adaptor, AdaptorConfig, SegmentValues, SideShape, relative_tables, table_weights
from ofakern.nn.relative import RelativeBlock, text_block


@dataclass(frozen=True, kw_only=True)
class TextAdaptorConfig(AdaptorConfig):
    """max_position: longest segment; bucket_size: B of the `2B - 1` relative rows."""

    name: ClassVar[str] = "text"
    max_position: int = 1024
    bucket_size: int = 256


class TextAdaptor(Adaptor):
    """value: int64 `[n_tokens]`. Positions count from 0 in every segment."""

    def __init__(self, config: TextAdaptorConfig, side: SideShape) -> None:
        super().__init__(config, side)
        self.config = config
        self.embed_positions = nn.Embedding(config.max_position + 2, side.dim)
        self.token_rel_pos_table_list = relative_tables(side.tables, 2 * config.bucket_size - 1, side.heads)

    def embed(self, values: SegmentValues, embed_tokens: nn.Embedding) -> Tensor:
        return torch.nn.functional.embedding(values.value, embed_tokens.weight)

    def position(self, values: SegmentValues) -> Tensor:
        return torch.nn.functional.embedding(values.positions, self.embed_positions.weight)

    def block(self, values: SegmentValues, causal: bool) -> RelativeBlock:
        longest = int(values.lengths.max()) if values.lengths.numel() else 0
        return self.block_of_length(longest, causal)

    def block_of_length(self, length: int, causal: bool) -> RelativeBlock:
        """The block of positions 0 .. length-1. Raises OfakernValueError beyond max_position."""
        return text_block(length, self.config.bucket_size, self.config.max_position, causal)

    def coordinates(self, values: SegmentValues) -> Tensor:
        return values.positions.cpu()

    def tables(self) -> Sequence[Tensor]:
        return table_weights(self.token_rel_pos_table_list)

"""The text adaptor: token ids (text, boxes and other tokenised slots) to embeddings, positions and log buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn.adaptor import AdaptorConfig, SegmentValues, SideShape, TokenAdaptor, relative_tables, table_weights
from ofakern.nn.relative import RelativeBlock, text_block


@dataclass(frozen=True, kw_only=True)
class TextAdaptorConfig(AdaptorConfig):
    """max_position: longest segment; bucket_size: B of the `2B - 1` relative rows; bucket_range: positions that the log
    buckets span (None: max_position; OFA's code has 1024 whatever the table's size)."""

    name: ClassVar[str] = "text"
    max_position: int = 1024
    bucket_size: int = 256
    bucket_range: int | None = None


class TextAdaptor(TokenAdaptor):
    """value: int64 `[n_tokens]`. Positions count from 0 in every segment."""

    def __init__(self, config: TextAdaptorConfig, side: SideShape) -> None:
        super().__init__(config, side)
        self.config = config
        self.embed_positions = nn.Embedding(config.max_position + 2, side.dim)
        self.token_rel_pos_table_list = relative_tables(side.tables, 2 * config.bucket_size - 1, side.heads)

    def embed(self, values: SegmentValues, embed_tokens: nn.Embedding) -> Tensor:
        return torch.nn.functional.embedding(values.value, embed_tokens.weight)

    def table(self, embed_tokens: nn.Embedding) -> Tensor:
        return embed_tokens.weight

    def position(self, values: SegmentValues) -> Tensor:
        return torch.nn.functional.embedding(values.positions, self.embed_positions.weight)

    def block(self, values: SegmentValues, causal: bool) -> RelativeBlock:
        longest = int(values.lengths.max()) if values.lengths.numel() else 0
        return self.block_of_length(longest, causal)

    def block_of_length(self, length: int, causal: bool) -> RelativeBlock:
        """The block of positions 0 .. length-1. Raises OfakernValueError beyond max_position."""
        if length > self.config.max_position:
            raise OfakernValueError(
                f"text: length must be at most max_position ({self.config.max_position}), got {length}"
            )
        return text_block(length, self.config.bucket_size, self.config.bucket_range or self.config.max_position, causal)

    def step_coordinates(self, length: int) -> tuple[Tensor, Tensor]:
        places = torch.arange(length)
        return places, places

    def coordinates(self, values: SegmentValues) -> Tensor:
        return values.positions.cpu()

    def tables(self) -> Sequence[Tensor]:
        return table_weights(self.token_rel_pos_table_list)

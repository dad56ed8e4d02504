"""The `image_vqgan` adaptor: an image as a begin token and a row-major grid of codes, written by the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn.adaptor import AdaptorConfig, SegmentValues, SideShape, TokenAdaptor, relative_tables, table_weights
from ofakern.nn.relative import (
    RelativeBlock,
    SpecialRows,
    causal_special_coordinates,
    causal_with_special,
    grid_block,
    grid_coordinates,
    grid_extent,
)


@dataclass(frozen=True, kw_only=True)
class ImageCodesConfig(AdaptorConfig):
    """window: codes per row of the grid (image side / 8 for an f8 VQGAN); bucket_size: the largest grid side."""

    name: ClassVar[str] = "image_vqgan"
    window: int = 32
    bucket_size: int = 42

    def __post_init__(self) -> None:
        if not 0 < self.window <= self.bucket_size:
            raise OfakernValueError(
                f"ImageCodesConfig: window must be in [1, {self.bucket_size}] (the bucket size), got {self.window}"
            )


class ImageCodesAdaptor(TokenAdaptor):
    """value: int64 `[n_tokens]`, every segment a begin token and up to window^2 codes."""

    def __init__(self, config: ImageCodesConfig, side: SideShape) -> None:
        super().__init__(config, side)
        self.config = config
        self.embed_code_positions = nn.Embedding(config.bucket_size**2 + 1, side.dim)
        rows = (2 * config.bucket_size - 1) ** 2 + 3
        self.code_rel_pos_table_list = relative_tables(side.tables, rows, side.heads)

    def embed(self, values: SegmentValues, embed_tokens: nn.Embedding) -> Tensor:
        return nn.functional.embedding(values.value, embed_tokens.weight)

    def position(self, values: SegmentValues) -> Tensor:
        window, bucket = self.config.window, self.config.bucket_size
        cell = (values.positions - 1).clamp(min=0)
        place = torch.div(cell, window, rounding_mode="floor") * bucket + cell % window + 1
        return nn.functional.embedding(place * (values.positions > 0), self.embed_code_positions.weight)

    def block(self, values: SegmentValues, causal: bool) -> RelativeBlock:
        return self.block_of_length(self._longest(values), causal)

    def block_of_length(self, length: int, causal: bool) -> RelativeBlock:
        """The block of a begin token and length - 1 codes. Raises OfakernValueError beyond the grid."""
        if not causal:
            raise OfakernValueError("image_vqgan: side must be the target (its codes are written), got the source")
        window, bucket = self.config.window, self.config.bucket_size
        if length > window * window + 1:
            raise OfakernValueError(f"image_vqgan: length must be at most {window * window + 1} tokens, got {length}")
        return causal_with_special(grid_block(self._height(length), window, bucket), SpecialRows.of_image(bucket))

    def step_coordinates(self, length: int) -> tuple[Tensor, Tensor]:
        height, window = self._height(length), self.config.window
        query, key = causal_special_coordinates(grid_extent(height, window))
        grid = grid_coordinates(height, window)[: max(length - 1, 0)]
        return torch.cat([torch.tensor([query]), grid]), torch.cat([torch.tensor([key]), grid])

    def coordinates(self, values: SegmentValues) -> Tensor:
        return self.step_coordinates(self._longest(values))[0][values.positions.cpu()]

    def key_coordinates(self, values: SegmentValues) -> Tensor:
        return self.step_coordinates(self._longest(values))[1][values.positions.cpu()]

    def tables(self) -> Sequence[Tensor]:
        return table_weights(self.code_rel_pos_table_list)

    def _longest(self, values: SegmentValues) -> int:
        return int(values.lengths.max()) if values.lengths.numel() else 1

    def _height(self, length: int) -> int:
        return max(-(-(length - 1) // self.config.window), 1)

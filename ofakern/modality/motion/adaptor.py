"""The `motion_6d` adaptor: frames of a motion as vectors, noisy ones marked with their noise level.

value: float32 `[n_tokens, D]`, a row per frame. levels: int64 `[n_tokens]`, 0 for clean frames, t + 1 for diffusion
step t; without levels all frames are clean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn.adaptor import Adaptor, AdaptorConfig, SegmentValues, SideShape, relative_tables, table_weights
from ofakern.nn.relative import RelativeBlock, text_block


@dataclass(frozen=True, kw_only=True)
class MotionConfig(AdaptorConfig):
    """max_position: most frames; bucket_size: B of the `2B - 1` relative rows; max_data_dim: most numbers per frame
    (6 + 6 per joint); max_noise_levels: clean and the diffusion steps."""

    name: ClassVar[str] = "motion_6d"
    max_position: int = 1024
    bucket_size: int = 256
    max_data_dim: int = 512
    max_noise_levels: int = 1024


class MotionAdaptor(Adaptor):
    """Two linear layers in, a scale and shift by noise level (FiLM), positions and log buckets as text; two linear
    layers out. As a target all frames are predicted at once, so each sees all others."""

    ordered: ClassVar[bool] = False

    def __init__(self, config: MotionConfig, side: SideShape) -> None:
        super().__init__(config, side)
        self.config = config
        dim, data = side.dim, config.max_data_dim
        self.embed_positions = nn.Embedding(config.max_position + 2, dim)
        self.token_rel_pos_table_list = relative_tables(side.tables, 2 * config.bucket_size - 1, side.heads)
        self.frame_encoder = nn.Sequential(nn.Linear(data, dim), nn.GELU(), nn.Linear(dim, dim))
        self.frame_decoder = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, data))
        self.noise_level_emb = nn.Embedding(config.max_noise_levels, 2 * dim)

    def embed(self, values: SegmentValues, embed_tokens: nn.Embedding) -> Tensor:
        frames = values.value
        if frames.dim() != 2 or frames.shape[1] > self.config.max_data_dim:
            raise OfakernValueError(
                f"motion_6d: value must be [frames, at most {self.config.max_data_dim}], got {list(frames.shape)}"
            )
        dtype = self.noise_level_emb.weight.dtype
        x: Tensor = self.frame_encoder(F.pad(frames.to(dtype), (0, self.config.max_data_dim - frames.shape[1])))
        levels = frames.new_zeros(frames.shape[0], dtype=torch.int64) if values.levels is None else values.levels
        scale, shift = self.noise_level_emb(levels).chunk(2, dim=-1)
        y: Tensor = (scale + 1) * x + shift
        return y

    def position(self, values: SegmentValues) -> Tensor:
        return F.embedding(values.positions, self.embed_positions.weight)

    def block(self, values: SegmentValues, causal: bool) -> RelativeBlock:
        longest = int(values.lengths.max()) if values.lengths.numel() else 0
        if longest > self.config.max_position:
            raise OfakernValueError(
                f"motion_6d: length must be at most max_position ({self.config.max_position}) frames, got {longest}"
            )
        return text_block(longest, self.config.bucket_size, self.config.max_position, causal)

    def coordinates(self, values: SegmentValues) -> Tensor:
        return values.positions.cpu()

    def tables(self) -> Sequence[Tensor]:
        return table_weights(self.token_rel_pos_table_list)

    def zero_at_start(self) -> Sequence[Tensor]:
        return (*super().zero_at_start(), self.noise_level_emb.weight)

    def output(self, hidden: Tensor, width: int) -> Tensor:
        """The clean frames `[n_tokens, width]` that the decoder's states `[n_tokens, D]` predict."""
        frames: Tensor = self.frame_decoder(hidden)[:, :width]
        return frames

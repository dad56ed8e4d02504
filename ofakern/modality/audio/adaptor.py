"""The source half of the `audio_fbank` adaptor: filter banks to tokens at a quarter of the frame rate.

value: float32 `[n, frames, 80]`. A segment takes the first `length` of the tokens its frames give; `tokens_of` says
how many there are. OFASys counts up to one token more per padded sample (`tokens_in_ofasys`): it has seen padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn.adaptor import Adaptor, AdaptorConfig, SegmentValues, SideShape, relative_tables, table_weights
from ofakern.nn.relative import RelativeBlock, text_block

MEL_BINS = 80
# Where the log buckets of audio end in the published code, whatever the table's size.
_BUCKET_RANGE = 4096


@dataclass(frozen=True, kw_only=True)
class AudioFbankConfig(AdaptorConfig):
    """max_position: most tokens of a segment, which is also the bucket size of its relative tables."""

    name: ClassVar[str] = "audio_fbank"
    max_position: int = 1024


def tokens_of(frames: int) -> int:
    """Tokens that `frames` frames give: two convolutions of width 3 and stride 2, without padding."""
    return max(((frames - 1) // 2 - 1) // 2, 0)


def tokens_in_ofasys(frames: int, padded: int) -> int:
    """Tokens that OFASys keeps of a sample of `frames` frames in a batch padded to `padded`."""
    return min(((frames + 1) // 2 + 1) // 2, tokens_of(padded))


class Subsample(nn.Module):
    """f32 `[n, frames, 80]` to `[n, tokens_of(frames), D]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, dim, 3, 2), nn.ReLU(), nn.Conv2d(dim, dim, 3, 2), nn.ReLU())
        self.out = nn.Sequential(nn.Linear(dim * tokens_of(MEL_BINS), dim))

    def forward(self, frames: Tensor) -> Tensor:
        features = self.conv(frames[:, None])
        projected: Tensor = self.out(features.transpose(1, 2).flatten(2))
        return projected


class AudioFbankAdaptor(Adaptor):
    """Two strided convolutions over filter banks, positions and log buckets by token."""

    def __init__(self, config: AudioFbankConfig, side: SideShape) -> None:
        super().__init__(config, side)
        self.config = config
        self.subsample = Subsample(side.dim)
        self.embed_audio_positions = nn.Embedding(config.max_position, side.dim)
        self.audio_rel_pos_table_list = relative_tables(side.tables, 2 * config.max_position - 1, side.heads)

    def embed(self, values: SegmentValues, embed_tokens: nn.Embedding) -> Tensor:
        frames = values.value
        if frames.dim() != 3 or frames.shape[2] != MEL_BINS:
            raise OfakernValueError(
                f"AudioFbankAdaptor: value must be [n, frames, {MEL_BINS}], got {list(frames.shape)}"
            )
        tokens = self.subsample(frames.to(self.subsample.out[0].weight.dtype))  # type: ignore[arg-type]
        count, longest = tokens.shape[:2]
        segment = torch.arange(count, device=frames.device).repeat_interleave(
            values.lengths.to(frames.device, torch.int64), output_size=values.positions.shape[0]
        )
        flat: Tensor = tokens.flatten(0, 1).index_select(0, segment * longest + values.positions)
        return flat

    def position(self, values: SegmentValues) -> Tensor:
        positions: Tensor = self.embed_audio_positions(values.positions)
        return positions

    def block(self, values: SegmentValues, causal: bool) -> RelativeBlock:
        longest = int(values.lengths.max()) if values.lengths.numel() else 0
        limit = min(tokens_of(values.value.shape[1]), self.config.max_position)
        if longest > limit:
            raise OfakernValueError(f"AudioFbankAdaptor: length must be at most {limit} tokens, got {longest}")
        return text_block(longest, self.config.max_position, _BUCKET_RANGE, causal)

    def coordinates(self, values: SegmentValues) -> Tensor:
        return values.positions.cpu()

    def tables(self) -> Sequence[Tensor]:
        return table_weights(self.audio_rel_pos_table_list)

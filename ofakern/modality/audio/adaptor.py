"""The audio adaptors: filter banks to tokens at a quarter of the frame rate, and frames of speech to write.

Source values: float32 `[n, frames, F]`. A segment takes the first `length` of the tokens its frames give; `tokens_of`
says how many there are. OFASys counts up to one token more per padded sample (`tokens_in_ofasys`): it has seen padding.
Target values: float32 `[n_tokens, F]`, a frame (or `n_frames_per_step` of them) each; see `speech.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.modality.audio.speech import Postnet, Prenet, SpeechOutput
from ofakern.nn.adaptor import (
    Adaptor,
    AdaptorConfig,
    FrameAdaptor,
    SegmentValues,
    SideShape,
    relative_tables,
    table_weights,
)
from ofakern.nn.relative import RelativeBlock, text_block

MEL_BINS = 80
# Where the log buckets of audio end in the published code, whatever the table's size.
_BUCKET_RANGE = 4096


@dataclass(frozen=True, kw_only=True)
class AudioFbankConfig(AdaptorConfig):
    """Names and defaults are OFASys's.

    max_position: most tokens of a segment, which is also the bucket size of its relative tables. output_frame_dim: mel
    bins; n_frames_per_step: frames that make one step (one row of values). The rest is of writing speech: prenet_*
    shape what reads the last frame, postnet_* the convolutions that refine all frames. Of its loss: stop_weight, that
    of a last step in the stop signal's cross entropy; guided_attention, the weight of keeping the last cross attention
    near the diagonal (0: off), within guided_attention_sigma.
    """

    name: ClassVar[str] = "audio_fbank"
    max_position: int = 1024
    output_frame_dim: int = MEL_BINS
    n_frames_per_step: int = 1
    prenet_layers: int = 2
    prenet_dim: int = 256
    prenet_dropout: float = 0.5
    postnet_conv_dim: int = 512
    postnet_conv_kernel_size: int = 5
    postnet_layers: int = 5
    postnet_dropout: float = 0.5
    stop_weight: float = 1.0
    guided_attention: float = 0.0
    guided_attention_sigma: float = 0.4

    @property
    def frame_dim(self) -> int:
        """F: values of one step."""
        return self.output_frame_dim * self.n_frames_per_step


@dataclass(frozen=True, kw_only=True)
class AudioTargetConfig(AudioFbankConfig):
    """The same without the source half: OFASys's adaptor for targets alone."""

    name: ClassVar[str] = "audio_tgt_fbank"


def tokens_of(frames: int) -> int:
    """Tokens that `frames` frames give: two convolutions of width 3 and stride 2, without padding."""
    return max(((frames - 1) // 2 - 1) // 2, 0)


def tokens_in_ofasys(frames: int, padded: int) -> int:
    """Tokens that OFASys keeps of a sample of `frames` frames in a batch padded to `padded`."""
    return min(((frames + 1) // 2 + 1) // 2, tokens_of(padded))


class Subsample(nn.Module):
    """f32 `[n, frames, F]` to `[n, tokens_of(frames), D]`."""

    def __init__(self, frame_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, dim, 3, 2), nn.ReLU(), nn.Conv2d(dim, dim, 3, 2), nn.ReLU())
        self.out = nn.Sequential(nn.Linear(dim * tokens_of(frame_dim), dim))

    def forward(self, frames: Tensor) -> Tensor:
        features = self.conv(frames[:, None])
        projected: Tensor = self.out(features.transpose(1, 2).flatten(2))
        return projected


class AudioFbankAdaptor(Adaptor):
    """The source half: two strided convolutions over filter banks, positions and log buckets by token."""

    def __init__(self, config: AudioFbankConfig, side: SideShape) -> None:
        super().__init__(config, side)
        self.config = config
        self.subsample = Subsample(config.frame_dim, side.dim)
        self.embed_audio_positions = nn.Embedding(config.max_position, side.dim)
        self.audio_rel_pos_table_list = relative_tables(side.tables, 2 * config.max_position - 1, side.heads)

    def embed(self, values: SegmentValues, embed_tokens: nn.Embedding) -> Tensor:
        frames = values.value
        if frames.dim() != 3 or frames.shape[2] != self.config.frame_dim:
            raise OfakernValueError(
                f"AudioFbankAdaptor: value must be [n, frames, {self.config.frame_dim}], got {list(frames.shape)}"
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


class AudioFrameAdaptor(FrameAdaptor):
    """The target half: a pre-net over the frame before, positions and log buckets by step, output layers of its own."""

    def __init__(self, config: AudioFbankConfig, side: SideShape) -> None:
        super().__init__(config, side)
        self.config = config
        self.step_shape = (config.frame_dim,)
        self.prenet = nn.Sequential(
            Prenet(config.frame_dim, config.prenet_layers, config.prenet_dim, config.prenet_dropout),
            nn.Linear(config.prenet_dim, side.dim),
        )
        self.embed_audio_positions = nn.Embedding(config.max_position, side.dim)
        self.audio_rel_pos_table_list = relative_tables(side.tables, 2 * config.max_position - 1, side.heads)
        self.feat_proj = nn.Linear(side.dim, config.frame_dim)
        self.eos_proj = nn.Linear(side.dim, 1)
        self.postnet = Postnet(
            config.frame_dim,
            config.postnet_conv_dim,
            config.postnet_conv_kernel_size,
            config.postnet_layers,
            config.postnet_dropout,
        )

    def embed(self, values: SegmentValues, embed_tokens: nn.Embedding) -> Tensor:
        frames = values.value
        if frames.dim() != 2 or frames.shape[1] != self.config.frame_dim:
            raise OfakernValueError(
                f"AudioFrameAdaptor: value must be [n_tokens, {self.config.frame_dim}], got {list(frames.shape)}"
            )
        embed: Tensor = self.prenet(frames.to(self.feat_proj.weight.dtype))
        return embed

    def position(self, values: SegmentValues) -> Tensor:
        positions: Tensor = self.embed_audio_positions(values.positions)
        return positions

    def block(self, values: SegmentValues, causal: bool) -> RelativeBlock:
        return self.block_of_length(int(values.lengths.max()) if values.lengths.numel() else 0, causal)

    def block_of_length(self, length: int, causal: bool) -> RelativeBlock:
        """The block of steps 0 .. length-1. Raises OfakernValueError beyond max_position."""
        limit = self.config.max_position
        if length > limit:
            raise OfakernValueError(f"{self.config.name}: length must be at most max_position ({limit}), got {length}")
        return text_block(length, limit, _BUCKET_RANGE, causal)

    def step_coordinates(self, length: int) -> tuple[Tensor, Tensor]:
        places = torch.arange(length)
        return places, places

    def coordinates(self, values: SegmentValues) -> Tensor:
        return values.positions.cpu()

    def tables(self) -> Sequence[Tensor]:
        return table_weights(self.audio_rel_pos_table_list)

    def frames(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.feat_proj(hidden), self.eos_proj(hidden)[:, 0]

    def refine(self, frames: Tensor, lengths: Sequence[int]) -> Tensor:
        refined: Tensor = frames + self.postnet(frames, lengths)
        return refined

    def outputs(self, hidden: Tensor, lengths: Sequence[int]) -> SpeechOutput:
        """Of whole segments' states `[N, D]`, end to end."""
        feature, stop = self.frames(hidden)
        return SpeechOutput(feature, self.refine(feature, lengths), stop)

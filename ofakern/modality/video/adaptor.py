"""The `video_image_sequence` adaptor: frames through the image backbone, with two relative terms.

value: float32 `[n, frames, 3, S, S]`. Patches of one video see each other through the image tables (by their places in
the frames, whatever frames) plus a table over frames (by how many frames lie between).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.modality.image.adaptor import ImageResnetAdaptor
from ofakern.nn.adaptor import Adaptor, AdaptorConfig, SegmentValues, SideShape, relative_tables, table_weights
from ofakern.nn.relative import RelativeBlock, text_block

# The most frames of a video, and where the log buckets end, in the published code.
MAX_FRAMES = 1024


@dataclass(frozen=True, kw_only=True)
class VideoConfig(AdaptorConfig):
    """bucket_size: B of the `2B - 1` rows over frames. The model must have `image_resnet` too: its backbone,
    projection, positions and image tables serve the frames."""

    name: ClassVar[str] = "video_image_sequence"
    bucket_size: int = 256


@dataclass(frozen=True)
class _Frames:
    """All frames of all videos as images."""

    value: Tensor
    lengths: Tensor
    positions: Tensor
    partial: bool = False
    levels: Tensor | None = None


class VideoAdaptor(Adaptor):
    """Patches of all frames, frame by frame; positions are the patch's in its frame plus the frame's."""

    def __init__(self, config: VideoConfig, side: SideShape) -> None:
        super().__init__(config, side)
        self.config = config
        self.embed_frame_positions = nn.Embedding(MAX_FRAMES + 1, side.dim)
        self.video_rel_pos_table_list = relative_tables(side.tables, 2 * config.bucket_size - 1, side.heads)
        self._bound: tuple[ImageResnetAdaptor, ...] = ()  # a tuple: the parameters stay the image adaptor's

    def bind(self, adaptors: Mapping[str, Adaptor]) -> None:
        """Takes the image adaptor of the same side. Raises OfakernValueError when there is none."""
        images = adaptors.get("image_resnet")
        if not isinstance(images, ImageResnetAdaptor):
            raise OfakernValueError(
                f"video_image_sequence: adaptors must include 'image_resnet', whose backbone it uses, "
                f"got {sorted(adaptors)}"
            )
        self._bound = (images,)

    @property
    def images(self) -> ImageResnetAdaptor:
        return self._bound[0]

    def embed(self, values: SegmentValues, embed_tokens: nn.Embedding) -> Tensor:
        return self.images.embed(self._frames(values), embed_tokens)

    def position(self, values: SegmentValues) -> Tensor:
        count, frames = values.value.shape[:2]
        patches = self.images.position(self._frames(values)).view(count, frames, -1, self.side.dim)
        # Row 0 is left to padding in the published code.
        time = self.embed_frame_positions.weight[1 : frames + 1]
        return (patches + time[:, None]).flatten(0, 2)

    def block(self, values: SegmentValues, causal: bool) -> RelativeBlock:
        return self.images.block(self._frames(values), causal)

    def coordinates(self, values: SegmentValues) -> Tensor:
        return self.images.coordinates(self._frames(values))

    def tables(self) -> Sequence[Tensor]:
        return self.images.tables()

    def second_block(self, values: SegmentValues) -> RelativeBlock:
        return text_block(values.value.shape[1], self.config.bucket_size, MAX_FRAMES)

    def second_coordinates(self, values: SegmentValues) -> Tensor:
        count, frames = values.value.shape[:2]
        patches = values.positions.shape[0] // max(count * frames, 1)
        return torch.arange(frames).repeat_interleave(patches).repeat(count)

    def second_tables(self) -> Sequence[Tensor]:
        return table_weights(self.video_rel_pos_table_list)

    def _frames(self, values: SegmentValues) -> _Frames:
        if values.value.dim() != 5:
            raise OfakernValueError(
                f"video_image_sequence: value must be [n, frames, 3, S, S], got {list(values.value.shape)}"
            )
        return _Frames(values.value.flatten(0, 1), values.lengths, values.positions)

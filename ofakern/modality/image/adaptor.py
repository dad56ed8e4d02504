"""Image adaptors: `image_resnet`, `image_vit` and `image_patch_embed`. value: float32 `[n, 3, S, S]`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.modality.image.preprocess import ImageTransform
from ofakern.modality.image.resnet import STRIDE, WIDTH, ResNet
from ofakern.modality.image.vit import VisionTransformer
from ofakern.nn.adaptor import Adaptor, AdaptorConfig, SegmentValues, SideShape, relative_tables, table_weights
from ofakern.nn.linear import Linear
from ofakern.nn.recompute import freed_behind
from ofakern.nn.relative import RelativeBlock, grid_block, grid_coordinates
from ofakern.ops.patch_embed import patch_embed


@dataclass(frozen=True, kw_only=True)
class ImageResnetConfig(AdaptorConfig):
    """bucket_size: the largest grid side; drop_path: of the backbone's blocks.

    position_grid: side of the grid that the positions were trained on; a larger grid interpolates its positions (not
    its relative bias). resnet_blocks, resnet_width: blocks per stage and channels of the stem, for backbones smaller
    than `resnet_type`.
    """

    name: ClassVar[str] = "image_resnet"
    resnet_type: str = "resnet101"
    resnet_blocks: tuple[int, int, int] | None = None
    resnet_width: int = WIDTH
    bucket_size: int = 42
    drop_path: float = 0.0
    freeze_batch_norm: bool = False
    position_grid: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.resnet_blocks, list):  # as JSON gives it
            object.__setattr__(self, "resnet_blocks", tuple(self.resnet_blocks))


@dataclass(frozen=True, kw_only=True)
class ImageVitConfig(AdaptorConfig):
    """bucket_size: the largest grid side; drop_path: of the backbone's blocks."""

    name: ClassVar[str] = "image_vit"
    vit_type: str = "vit_base"
    bucket_size: int = 42
    drop_path: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ImagePatchEmbedConfig(AdaptorConfig):
    """Images and patches of one fixed size (pixels); class_token: a learned token in front of the patches."""

    name: ClassVar[str] = "image_patch_embed"
    image_height: int = 224
    image_width: int = 224
    patch_height: int = 16
    patch_width: int = 16
    class_token: bool = True


class _GridAdaptor(Adaptor):
    """What backbones with a 2-D grid of patches share: position rows, relative tables, coordinates."""

    def __init__(self, config: ImageResnetConfig | ImageVitConfig, side: SideShape, features: int) -> None:
        super().__init__(config, side)
        self.bucket_size = config.bucket_size
        self.position_grid = config.position_grid if isinstance(config, ImageResnetConfig) else None
        self.embed_image_positions = nn.Embedding(config.bucket_size**2 + 1, side.dim)
        self.image_proj = Linear(features, side.dim)
        rows = (2 * config.bucket_size - 1) ** 2 + 3
        self.image_rel_pos_table_list = relative_tables(side.tables, rows, side.heads)

    @abstractmethod
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches per column and row of an image of `height x width` pixels."""

    def position(self, values: SegmentValues) -> Tensor:
        height, width = self._grid_of(values)
        if self.position_grid is not None and height * width > self.position_grid**2:
            positions = self._interpolated(self.position_grid, height, width)
        else:
            positions = self._positions(height, width)
        if values.partial:
            return positions.index_select(0, values.positions)
        return positions.repeat(values.value.shape[0], 1)

    def _positions(self, height: int, width: int) -> Tensor:
        """`[height * width, D]`. Row 0 of the table is the begin token of image codes; a row of patches always spans
        bucket_size entries."""
        device = self.embed_image_positions.weight.device
        rows = torch.arange(height, device=device)[:, None] * self.bucket_size + torch.arange(width, device=device) + 1
        positions: Tensor = self.embed_image_positions(rows.flatten())
        return positions

    def _interpolated(self, side: int, height: int, width: int) -> Tensor:
        trained = self._positions(side, side).view(1, side, side, -1).permute(0, 3, 1, 2)
        resized = nn.functional.interpolate(trained, size=(height, width), mode="bilinear", align_corners=False)
        return resized[0].flatten(1).t()

    def taken(self, features: Tensor, values: SegmentValues) -> Tensor:
        """The patches `[n_tokens, C]` that the segments take of `[n, height * width, C]`."""
        flat = features.flatten(0, 1)
        if not values.partial:
            return flat
        device, per_image = features.device, features.shape[1]
        image = torch.arange(features.shape[0], device=device).repeat_interleave(
            values.lengths.to(device, torch.int64), output_size=values.positions.shape[0]
        )
        return flat.index_select(0, image * per_image + values.positions)

    def block(self, values: SegmentValues, causal: bool) -> RelativeBlock:
        return grid_block(*self._grid_of(values), self.bucket_size)

    def coordinates(self, values: SegmentValues) -> Tensor:
        height, width = self._grid_of(values)
        grid = grid_coordinates(height, width)
        if not values.partial:
            return grid.repeat(values.value.shape[0])
        places = values.positions.cpu()
        if places.numel() and not (0 <= int(places.min()) and int(places.max()) < height * width):
            raise OfakernValueError(
                f"{type(self).__name__}: positions must be in [0, {height * width}), "
                f"got {int(places.min())} .. {int(places.max())}"
            )
        return grid[places]

    def tables(self) -> Sequence[Tensor]:
        return table_weights(self.image_rel_pos_table_list)

    def _grid_of(self, values: SegmentValues) -> tuple[int, int]:
        height, width = self.grid(values.value.shape[2], values.value.shape[3])
        if not values.partial:
            _check_tokens(type(self).__name__, values, height * width)
        return height, width


class ImageResnetAdaptor(_GridAdaptor):
    """ResNet features at stride 16, projected to the model's width."""

    def __init__(self, config: ImageResnetConfig, side: SideShape) -> None:
        backbone = ResNet(
            config.resnet_type, config.drop_path, config.freeze_batch_norm, config.resnet_blocks, config.resnet_width
        )
        super().__init__(config, side, backbone.channels)
        self.embed_images = backbone

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // STRIDE), -(-width // STRIDE)

    def embed(self, values: SegmentValues, embed_tokens: nn.Embedding) -> Tensor:
        features = freed_behind(self.embed_images(values.value)).permute(0, 2, 3, 1).flatten(1, 2)
        projected: Tensor = self.image_proj(self.taken(features, values))
        return projected


class ImageVitAdaptor(_GridAdaptor):
    """Vision transformer patches, projected to the model's width."""

    def __init__(self, config: ImageVitConfig, side: SideShape) -> None:
        backbone = VisionTransformer(config.vit_type, config.drop_path)
        super().__init__(config, side, backbone.shape.width)
        self.embed_images = backbone

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.embed_images.grid(height, width)

    def embed(self, values: SegmentValues, embed_tokens: nn.Embedding) -> Tensor:
        features = self.embed_images(values.value)
        features = features.view(values.value.shape[0], -1, features.shape[-1])
        projected: Tensor = self.image_proj(self.taken(features, values))
        return projected


class ImagePatchEmbedAdaptor(Adaptor):
    """One product per patch, positions by patch number. It has no relative bias. `proj` holds a Conv2d's parameters."""

    def __init__(self, config: ImagePatchEmbedConfig, side: SideShape) -> None:
        super().__init__(config, side)
        if config.image_height % config.patch_height or config.image_width % config.patch_width:
            raise OfakernValueError(
                f"ImagePatchEmbedConfig: image must be a multiple of the patch ({config.patch_height} x "
                f"{config.patch_width}), got {config.image_height} x {config.image_width}"
            )
        self.config = config
        patch = (config.patch_height, config.patch_width)
        self.tokens = (config.image_height // patch[0]) * (config.image_width // patch[1]) + int(config.class_token)
        self.proj = nn.Conv2d(3, side.dim, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, side.dim)) if config.class_token else None
        self.embed_image_positions = nn.Embedding(self.tokens, side.dim)

    def embed(self, values: SegmentValues, embed_tokens: nn.Embedding) -> Tensor:
        images = values.value
        expected = (3, self.config.image_height, self.config.image_width)
        if tuple(images.shape[1:]) != expected:
            raise OfakernValueError(
                f"ImagePatchEmbedAdaptor: images must be {list(expected)} each, got {list(images.shape[1:])}"
            )
        _check_tokens("ImagePatchEmbedAdaptor", values, self.tokens)
        x = self._patches(images)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        return x.flatten(0, 1)

    def _patches(self, images: Tensor) -> Tensor:
        """`[n, cells, D]`; bytes are pixels before the transform's mean and deviation."""
        if images.device.type == "cpu" and not images.requires_grad:
            plain = images.dtype != torch.uint8
            mean, std = (None, None) if plain else (ImageTransform.mean, ImageTransform.std)
            tokens = patch_embed(images, self.proj.weight, self.proj.bias, mean=mean, std=std)
            return tokens.view(images.shape[0], self.tokens - int(self.config.class_token), tokens.shape[1])
        if images.dtype == torch.uint8:
            raise OfakernValueError("ImagePatchEmbedAdaptor: images must be floating point on a GPU, got torch.uint8")
        convolved: Tensor = self.proj(images.to(self.proj.weight.dtype))
        return convolved.flatten(2).transpose(1, 2)

    def position(self, values: SegmentValues) -> Tensor:
        return self.embed_image_positions.weight.repeat(values.value.shape[0], 1)

    def block(self, values: SegmentValues, causal: bool) -> None:
        return None

    def coordinates(self, values: SegmentValues) -> Tensor:
        return torch.zeros(values.positions.shape[0], dtype=torch.int64)

    def tables(self) -> Sequence[Tensor]:
        return ()


def _check_tokens(where: str, values: SegmentValues, tokens: int) -> None:
    given = values.positions.shape[0]
    if given != tokens * values.value.shape[0]:
        raise OfakernValueError(
            f"{where}: length must be {tokens} tokens for images of {values.value.shape[2]} x "
            f"{values.value.shape[3]}, got {given / max(values.value.shape[0], 1):g}"
        )

"""Patch embeddings as one product over patches: a convolution whose stride is its kernel, without its machinery."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn.dropin.base import DropIn


def embed_patches(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """image `[B,C,Y,X]`, weight `[D,C,p,q]` to `[B, Y//p, X//q, D]`: `conv2d` with stride (p, q), channels last.

    Rows and columns that fill no patch are left out, as by the convolution.
    """
    batch, channels, height, width = image.shape
    down, across = weight.shape[2:]
    rows, columns = height // down, width // across
    image = image[:, :, : rows * down, : columns * across]
    patches = image.reshape(batch, channels, rows, down, columns, across).permute(0, 2, 4, 1, 3, 5)
    return F.linear(patches.reshape(batch, rows, columns, -1), weight.flatten(1), bias)


def _conv_refusal(conv: Any) -> str | None:
    if not isinstance(conv, nn.Conv2d):
        return f"the projection must be a Conv2d, got {type(conv).__name__}"
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding in ((0, 0), "valid")
    if not plain or conv.kernel_size != conv.stride:
        return (
            "a patch convolution must have stride = kernel size, one group, no dilation and no padding, "
            f"got kernel {conv.kernel_size}, stride {conv.stride}, groups {conv.groups}, dilation {conv.dilation}, "
            f"padding {conv.padding}"
        )
    return None


def _pair(size: Any) -> tuple[int, int]:
    first, second = size if isinstance(size, Iterable) else (size, size)
    return first, second


class PatchConv2d(DropIn, nn.Conv2d):
    """torch.nn.Conv2d with stride = kernel size (patch embeddings anywhere): same constructor, parameters and output.

    Raises OfakernValueError for any other convolution.
    """

    replaced_names = ("Conv2d",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        reason = _conv_refusal(self)
        if reason is not None:
            raise OfakernValueError(f"PatchConv2d: {reason}")

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return _conv_refusal(module)

    def forward(self, input: Tensor) -> Tensor:
        """`[B,C,Y,X]` (or `[C,Y,X]`) to `[B,D,Y//p,X//q]`, a view of channels-last memory."""
        image = input if input.dim() == 4 else input[None]
        out = embed_patches(image, self.weight, self.bias).permute(0, 3, 1, 2)
        return out if input.dim() == 4 else out[0]


class PatchEmbeddings(DropIn):
    """transformers' ViTPatchEmbeddings and BeitPatchEmbeddings: key `projection`, `[B,C,Y,X]` to `[B,N,D]`."""

    replaced_names = ("ViTPatchEmbeddings", "BeitPatchEmbeddings")
    needed = ("num_channels", "projection")

    def __init__(self, config: Any) -> None:
        """config: image_size, patch_size, num_channels and hidden_size."""
        super().__init__()
        self.image_size, self.patch_size = _pair(config.image_size), _pair(config.patch_size)
        self.num_channels = config.num_channels
        self.num_patches = (self.image_size[1] // self.patch_size[1]) * (self.image_size[0] // self.patch_size[0])
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, self.patch_size, self.patch_size)

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return _conv_refusal(module.projection)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Raises OfakernValueError for another number of channels."""
        if pixel_values.shape[1] != self.num_channels:
            raise OfakernValueError(
                f"PatchEmbeddings: pixel_values must have {self.num_channels} channels, got {pixel_values.shape[1]}"
            )
        return embed_patches(pixel_values, self.projection.weight, self.projection.bias).flatten(1, 2)


class SwinPatchEmbeddings(DropIn):
    """transformers' SwinPatchEmbeddings: key `projection`, `[B,C,Y,X]` to (`[B,N,D]`, (rows, columns)), zero-padded."""

    replaced_names = ("SwinPatchEmbeddings",)
    needed = ("patch_size", "projection")

    def __init__(self, config: Any) -> None:
        """config: image_size, patch_size, num_channels and embed_dim."""
        super().__init__()
        image, self.patch_size = _pair(config.image_size), _pair(config.patch_size)
        self.grid_size = (image[0] // self.patch_size[0], image[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.projection = nn.Conv2d(config.num_channels, config.embed_dim, self.patch_size, self.patch_size)

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return _conv_refusal(module.projection)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pads to whole patches at the right and bottom."""
        image = _padded(pixel_values, self.patch_size)
        out = embed_patches(image, self.projection.weight, self.projection.bias)
        return out.flatten(1, 2), (out.shape[1], out.shape[2])


class PatchEmbed(DropIn):
    """timm's PatchEmbed: keys `proj` and `norm`; `[B,C,Y,X]` to `[B,N,D]` (flatten) or `[B,D,Y//p,X//p]`.

    `output_fmt` other than None or "NCHW" raises.
    """

    replaced_names = ("PatchEmbed",)
    needed = ("patch_size", "flatten", "proj", "norm")

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Any = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = _pair(patch_size)
        self.img_size = None if img_size is None else _pair(img_size)
        self.grid_size = None
        if self.img_size is not None:
            self.grid_size = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = None if self.grid_size is None else self.grid_size[0] * self.grid_size[1]
        self.flatten = flatten and output_fmt is None
        self.output_fmt = output_fmt
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()
        reason = self.refusal(self)
        if reason is not None:
            raise OfakernValueError(f"PatchEmbed: {reason}")

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        form = getattr(module, "output_fmt", None)
        if getattr(form, "value", form) not in (None, "NCHW"):
            return f"output_fmt must be None or 'NCHW', got {form!r}"
        return _conv_refusal(module.proj)

    def forward(self, x: Tensor) -> Tensor:
        """Raises OfakernValueError for an image of another size, or with sides that are not whole patches."""
        self._check(x.shape[2], x.shape[3])
        if getattr(self, "dynamic_img_pad", False):
            x = _padded(x, self.patch_size)
        out = embed_patches(x, self.proj.weight, self.proj.bias)
        out = out.flatten(1, 2) if self.flatten else out.permute(0, 3, 1, 2)
        normed: Tensor = self.norm(out)
        return normed

    def _check(self, height: int, width: int) -> None:
        if self.img_size is None:
            return
        if getattr(self, "strict_img_size", True):
            if (height, width) != tuple(self.img_size):
                raise OfakernValueError(
                    f"PatchEmbed: x must be an image of {tuple(self.img_size)}, got {(height, width)}"
                )
        elif not getattr(self, "dynamic_img_pad", False) and (
            height % self.patch_size[0] or width % self.patch_size[1]
        ):
            raise OfakernValueError(
                f"PatchEmbed: x must have sides that are multiples of {tuple(self.patch_size)}, got {(height, width)}"
            )


def _padded(image: Tensor, patch: tuple[int, int]) -> Tensor:
    bottom, right = -image.shape[2] % patch[0], -image.shape[3] % patch[1]
    return torch.nn.functional.pad(image, (0, right, 0, bottom)) if bottom or right else image

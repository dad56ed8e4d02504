"""The image tokenizer of OFA's image generation: a Gumbel VQ-GAN, pixels to codes and back.

State-dict keys are taming-transformers' (`GumbelVQ`), so its published weights load unchanged. Formulas: Esser, Rombach
and Ommer 2021. Encoding takes the most likely code; the published code adds Gumbel noise even then, so its codes of one
image differ from call to call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.errors import CheckpointError, OfakernValueError

__all__ = ["VQGAN", "VQGANConfig"]

_GROUPS = 32  # of every group norm
_TRAINING_ONLY = "loss."  # keys of the discriminator and perceptual loss


@dataclass(frozen=True)
class VQGANConfig:
    """The shape of a VQ-GAN; the defaults are OFA's (f8, 8192 codes, 256 x 256 pixels to 32 x 32 codes).

    codes: how many there are; embed_dim: width of a code. channels times multipliers[i]: width at the i-th resolution,
    each half the one before; blocks: residual blocks at each; attention: resolutions (grid sides, for images of
    `resolution` pixels) that have attention; latent: channels between encoder and codes.
    """

    codes: int = 8192
    embed_dim: int = 256
    resolution: int = 256
    in_channels: int = 3
    out_channels: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (32,)
    latent: int = 256

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention"):  # lists, as JSON gives them
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.multipliers or min(self.multipliers) < 1 or self.channels % _GROUPS:
            raise OfakernValueError(
                f"VQGANConfig: channels must be a multiple of {_GROUPS} and multipliers at least 1, "
                f"got {self.channels} and {self.multipliers}"
            )
        if self.resolution % self.factor:
            raise OfakernValueError(
                f"VQGANConfig: resolution must be a multiple of {self.factor}, got {self.resolution}"
            )

    @property
    def factor(self) -> int:
        """Pixels per code, along a side."""
        return 1 << (len(self.multipliers) - 1)

    @property
    def window(self) -> int:
        """Codes along a side of an image of `resolution` pixels."""
        return self.resolution // self.factor

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], resolution: int = 256) -> VQGANConfig:
        """What taming's tensors imply, for a model trained on images of `resolution` pixels. Raises CheckpointError."""
        try:
            levels = {int(key.split(".")[2]) for key in weights if key.startswith("encoder.down.")}
            widths = [weights[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in sorted(levels)]
            channels = weights["encoder.conv_in.weight"].shape[0]
            blocks = {key.split(".")[4] for key in weights if key.startswith("encoder.down.0.block.")}
            return cls(
                codes=weights["quantize.proj.weight"].shape[0],
                embed_dim=weights["quantize.embed.weight"].shape[1],
                resolution=resolution,
                in_channels=weights["encoder.conv_in.weight"].shape[1],
                out_channels=weights["decoder.conv_out.weight"].shape[0],
                channels=channels,
                multipliers=tuple(width // channels for width in widths),
                blocks=len(blocks),
                attention=tuple(
                    resolution // 2**i for i in sorted(levels) if f"encoder.down.{i}.attn.0.q.bias" in weights
                ),
                latent=weights["encoder.conv_out.weight"].shape[0],
            )
        except KeyError as error:
            raise CheckpointError(f"VQGANConfig: weights must be a Gumbel VQ-GAN's, got none for {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VQGANConfig:
        """Raises CheckpointError for unknown fields."""
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise CheckpointError(f"VQGANConfig: fields must be known ones, got {unknown}")
        return cls(**data)


class VQGAN(nn.Module):
    """images float32 `[n, 3, S, S]` in [-1, 1] <-> codes int64 `[n, (S / factor)^2]`, row by row."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quantize = nn.ModuleDict(
            {
                "proj": nn.Conv2d(config.latent, config.codes, 1),
                "embed": nn.Embedding(config.codes, config.embed_dim),
            }
        )
        self.quant_conv = nn.Conv2d(config.latent, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent, 1)

    def load_taming(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Loads taming's tensors by their keys; returns the keys that only its training needs.

        Raises CheckpointError for missing, unknown and misshapen ones.
        """
        dropped = [key for key in weights if key.startswith(_TRAINING_ONLY)]
        own = self.state_dict()
        kept = {key: value for key, value in weights.items() if key not in dropped}
        wrong = sorted(set(own) ^ set(kept)) or [k for k, v in own.items() if kept[k].shape != v.shape]
        if wrong:
            raise CheckpointError(
                f"VQGAN: keys must be those of its configuration, got {len(wrong)} others: {wrong[:5]}"
            )
        self.load_state_dict(kept)
        return dropped

    def latents(self, images: Tensor) -> Tensor:
        """`[n, embed_dim, h, w]` before quantisation. Raises OfakernValueError for sizes that are no multiple of the
        factor."""
        if images.dim() != 4 or images.shape[2] % self.config.factor or images.shape[3] % self.config.factor:
            raise OfakernValueError(
                f"VQGAN: images must be [n, {self.config.in_channels}, S, S], S a multiple of {self.config.factor}, "
                f"got {list(images.shape)}"
            )
        latents: Tensor = self.quant_conv(self.encoder(images))
        return latents

    def code_logits(self, images: Tensor) -> Tensor:
        """`[n, codes, h, w]`."""
        logits: Tensor = self.quantize["proj"](self.latents(images))
        return logits

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The most likely codes, int64 `[n, h * w]`."""
        codes: Tensor = self.code_logits(images).argmax(1).flatten(1)
        return codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The images `[n, 3, S, S]` of codes int64 `[n, h * h]`. Raises OfakernValueError for another count."""
        side = round(codes.shape[1] ** 0.5)
        if codes.dim() != 2 or side * side != codes.shape[1]:
            raise OfakernValueError(f"VQGAN: codes must be [n, a square number], got {list(codes.shape)}")
        vectors = self.quantize["embed"](codes).view(codes.shape[0], side, side, -1).permute(0, 3, 1, 2)
        return self._to_images(vectors)

    def forward(self, images: Tensor, temperature: float = 1.0) -> Tensor:
        """The reconstruction `[n, 3, S, S]`. In training codes are drawn with Gumbel noise, and gradients pass through
        their softmax at this temperature."""
        if not self.training:
            decoded: Tensor = self.decode(self.encode(images))
            return decoded
        chosen = F.gumbel_softmax(self.code_logits(images), tau=temperature, hard=True, dim=1)
        table = cast(nn.Embedding, self.quantize["embed"]).weight
        return self._to_images(torch.einsum("nchw,cd->ndhw", chosen, table))

    def _to_images(self, vectors: Tensor) -> Tensor:
        images: Tensor = self.decoder(self.post_quant_conv(vectors))
        return images


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = _norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        residual: Tensor = x if self.nin_shortcut is None else self.nin_shortcut(x)
        return y + residual


class _Attention(nn.Module):
    """One head over all places of the grid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (conv(y).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        projected: Tensor = self.proj_out(mixed)
        return x + projected


class _Level(nn.Module):
    """The blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, channels: int, out: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(_ResidualBlock(channels if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(_Attention(out) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        return x


class _Resize(nn.Module):
    """Half the side by a strided convolution (padded right and below), or twice by repeating and a convolution."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        resized = F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1))
        y: Tensor = self.conv(resized)
        return y


class _DownLevel(_Level):
    """A level of the encoder, then half the side where a smaller level follows."""

    def __init__(self, channels: int, out: int, blocks: int, attention: bool, smaller: bool) -> None:
        super().__init__(channels, out, blocks, attention)
        self.downsample = _Resize(out, up=False) if smaller else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y if self.downsample is None else self.downsample(y)


class _UpLevel(_Level):
    """A level of the decoder, then twice the side where a larger level follows."""

    def __init__(self, channels: int, out: int, blocks: int, attention: bool, larger: bool) -> None:
        super().__init__(channels, out, blocks, attention)
        self.upsample = _Resize(out, up=True) if larger else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y if self.upsample is None else self.upsample(y)


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = _ResidualBlock(channels, channels)
        self.attn_1 = _Attention(channels)
        self.block_2 = _ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return y


class _Encoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in (1, *config.multipliers)]
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level in range(len(config.multipliers)):
            attention = config.resolution // 2**level in config.attention
            smaller = level + 1 < len(config.multipliers)
            self.down.append(_DownLevel(widths[level], widths[level + 1], config.blocks, attention, smaller))
        self.mid = _Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for stage in self.down:
            x = stage(x)
        y: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return y


class _Decoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(config.latent, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1])
        self.up = nn.ModuleList()
        for level in range(len(widths)):  # run from the last to the first
            attention = config.resolution // 2**level in config.attention
            before = widths[min(level + 1, len(widths) - 1)]
            self.up.append(_UpLevel(before, widths[level], config.blocks + 1, attention, level > 0))
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        for stage in reversed(self.up):
            x = stage(x)
        y: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return y


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)

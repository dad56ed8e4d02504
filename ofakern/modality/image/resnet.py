"""The ResNet backbone of OFA: stem and the first three stages of bottleneck blocks (v1.5), stride 16, 1024 channels.

Small models may take fewer blocks and narrower ones.

Runs channels_last. Outside training, when nothing needs a gradient, every batch norm is folded into its convolution;
the folded weights are kept until a parameter, the mode, the dtype or the device changes. With a gradient a block keeps
its input and what its first two convolutions give, half of all that the backward pass reads: the rest is computed again
there, batch norms, activations and the last 1x1 convolution, a tenth of the block's products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn.recompute import recomputed

STAGES = {"resnet50": (3, 4, 6), "resnet101": (3, 4, 23), "resnet152": (3, 8, 36)}
STRIDE = 16
WIDTH = 64

Folded = dict[nn.Conv2d, tuple[Tensor, Tensor]]


class Bottleneck(nn.Module):
    """1x1, 3x3 (carries the stride), 1x1 convolutions with a residual."""

    def __init__(self, channels: int, width: int, stride: int, drop_path: float) -> None:
        super().__init__()
        out = 4 * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
        self.drop_path = drop_path

    def pairs(self) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        yield from ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
        if self.downsample is not None:
            conv, norm = self.downsample
            assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            yield conv, norm

    def forward(self, x: Tensor, folded: Folded | None) -> Tensor:
        y = self._branch(x) if folded is None else self._folded_branch(x, folded)
        if self.training and self.drop_path > 0:
            keep = y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(1.0 - self.drop_path).div_(1.0 - self.drop_path)
            y = y * keep
        return F.relu(y + self._residual(x, folded), inplace=True)

    def _branch(self, x: Tensor) -> Tensor:
        def middle(y: Tensor, first: bool) -> Tensor:
            out: Tensor = self.conv2(F.relu(normalise(y, self.bn1, first), inplace=True))
            return out

        def last(y: Tensor, first: bool) -> Tensor:
            return normalise(self.conv3(F.relu(normalise(y, self.bn2, first), inplace=True)), self.bn3, first)

        return recomputed(last, recomputed(middle, self.conv1(x)))

    def _folded_branch(self, x: Tensor, folded: Folded) -> Tensor:
        y = F.relu(convolve(x, self.conv1, folded), inplace=True)
        y = F.relu(convolve(y, self.conv2, folded), inplace=True)
        return convolve(y, self.conv3, folded)

    def _residual(self, x: Tensor, folded: Folded | None) -> Tensor:
        if self.downsample is None:
            return x
        conv, norm = self.downsample
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        if folded is not None:
            return convolve(x, conv, folded)
        return recomputed(lambda x, first: normalise(conv(x), norm, first), x)


class ResNet(nn.Module):
    """images f32 `[n, 3, S, S]` to features `[n, 16 * width, ceil(S/16), ceil(S/16)]`.

    kind: resnet50, resnet101 or resnet152; blocks: instead of its blocks per stage. width: channels of the stem, 64 in
    all of these. frozen_norm: batch norm keeps its running statistics in training too; in a new model that makes it a
    scale and a shift per channel.
    """

    def __init__(
        self,
        kind: str,
        drop_path: float = 0.0,
        frozen_norm: bool = False,
        blocks: tuple[int, int, int] | None = None,
        width: int = WIDTH,
    ) -> None:
        super().__init__()
        if kind not in STAGES:
            raise OfakernValueError(f"ResNet: kind must be one of {sorted(STAGES)}, got {kind!r}")
        stages = STAGES[kind] if blocks is None else blocks
        if len(stages) != 3 or min(stages) < 1:
            raise OfakernValueError(f"ResNet: blocks must be three counts of at least 1, got {blocks!r}")
        if width < 1:
            raise OfakernValueError(f"ResNet: width must be at least 1, got {width}")
        self.channels = 16 * width
        depth = sum(stages)
        rates = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
        self.frozen_norm = frozen_norm
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, 1, rates[: stages[0]])
        self.layer2 = _stage(4 * width, 2 * width, 2, rates[stages[0] : stages[0] + stages[1]])
        self.layer3 = _stage(8 * width, 4 * width, 2, rates[stages[0] + stages[1] :])
        self._folded: Folded | None = None
        self._folded_key: tuple[tuple[int, int], ...] = ()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def train(self, mode: bool = True) -> ResNet:
        super().train(mode)
        self._folded = None
        if self.frozen_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def blocks(self) -> Iterator[Bottleneck]:
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                assert isinstance(block, Bottleneck)
                yield block

    def pairs(self) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        yield self.conv1, self.bn1
        for block in self.blocks():
            yield from block.pairs()

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(dtype=self.conv1.weight.dtype, memory_format=torch.channels_last)
        folded = self._fold() if self._can_fold() else None
        if folded is None:
            x = recomputed(self._pooled, self.conv1(x))
        else:
            x = _pool(convolve(x, self.conv1, folded))
        for block in self.blocks():
            x = block(x, folded)
        return x

    def _pooled(self, y: Tensor, first: bool) -> Tensor:
        return _pool(normalise(y, self.bn1, first))

    def _can_fold(self) -> bool:
        needs_gradient = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        return not self.training and not needs_gradient

    def _fold(self) -> Folded:
        key = tuple(_stamp(t) for conv, norm in self.pairs() for t in (conv.weight, norm.weight, norm.running_var))
        if self._folded is None or key != self._folded_key:
            with torch.no_grad():
                self._folded = {conv: _folded_pair(conv, norm) for conv, norm in self.pairs()}
            self._folded_key = key
        return self._folded


def normalise(x: Tensor, norm: nn.BatchNorm2d, first: bool) -> Tensor:
    """norm(x); the second time running statistics have x already, and the batch's own are the same again."""
    if first or not norm.training:
        y: Tensor = norm(x)
        return y
    assert norm.running_mean is not None and norm.running_var is not None
    statistics = norm.running_mean.clone(), norm.running_var.clone()  # written to, and thrown away
    return F.batch_norm(x, *statistics, norm.weight, norm.bias, True, 0.0, norm.eps)


def convolve(x: Tensor, conv: nn.Conv2d, folded: Folded) -> Tensor:
    """Convolution and the batch norm that is folded into it."""
    weight, bias = folded[conv]
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


def _pool(x: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(x, inplace=True), 3, stride=2, padding=1)


def _folded_pair(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = conv.weight.double() * factor[:, None, None, None]
    bias = norm.bias.double() - norm.running_mean.double() * factor
    dtype = conv.weight.dtype
    return weight.to(dtype=dtype, memory_format=torch.channels_last), bias.to(dtype)


def _stamp(tensor: Tensor | None) -> tuple[int, int]:
    """Changes when a tensor is replaced or written in place (inference tensors keep no counter and cannot be)."""
    if tensor is None or tensor.is_inference():
        return id(tensor), 0
    return id(tensor), tensor._version


def _stage(channels: int, width: int, stride: int, rates: list[float]) -> nn.Sequential:
    blocks = [Bottleneck(channels, width, stride, rates[0])]
    blocks += [Bottleneck(4 * width, width, 1, rate) for rate in rates[1:]]
    return nn.Sequential(*blocks)

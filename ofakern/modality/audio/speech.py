"""The target half of the audio adaptors: log-mel frames in, frames and a stop signal out, as in Tacotron 2.

A decoder token is `n_frames_per_step` frames of sound. The decoder is given the frames shifted by one (a zero frame
first), its states become frames by a projection, and the post-net adds what it can read from the frames around.
Source: Shen et al. 2018, arXiv:1712.05884, sections 2.2 and 2.3; Li et al. 2019, arXiv:1809.08895 for Transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.errors import OfakernValueError

__all__ = ["Postnet", "Prenet", "SpeechOutput"]


@dataclass(frozen=True)
class SpeechOutput:
    """What a decoder says about N steps: frames `[N, F]` before and after the post-net, stop logits `[N]`."""

    feature: Tensor
    post: Tensor
    stop: Tensor


class Prenet(nn.Module):
    """Frames `[N, F]` to `[N, width]`: linear layers with ReLU and a dropout that is on in evaluation too.

    The dropout keeps the decoder from copying the last frame, and its absence at generation changes what it sees.
    """

    def __init__(self, frame_dim: int, layers: int, width: int, dropout: float) -> None:
        super().__init__()
        inputs = [frame_dim] + [width] * (layers - 1)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(n, width), nn.ReLU()) for n in inputs)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.dropout(layer(x), self.dropout, training=True)
        return x


class Postnet(nn.Module):
    """What to add to the frames of whole segments: convolutions over time with batch norm, tanh between them.

    Every layer sees zeros before and behind a segment, so a segment's result does not depend on its batch; batch
    statistics are of real frames only.
    """

    def __init__(self, frame_dim: int, width: int, kernel_size: int, layers: int, dropout: float) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise OfakernValueError(f"Postnet: kernel_size must be odd, got {kernel_size}")
        widths = [frame_dim] + [width] * (layers - 1) + [frame_dim]
        self.convolutions = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(before, after, kernel_size, padding=kernel_size // 2),
                nn.BatchNorm1d(after),
                *([nn.Tanh()] if number < layers - 1 else []),
                nn.Dropout(dropout),
            )
            for number, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        )

    def forward(self, frames: Tensor, lengths: Sequence[int]) -> Tensor:
        """frames `[N, F]`: segments of these lengths end to end. Returns `[N, F]`."""
        if not frames.shape[0]:
            return frames
        places = _places(lengths, frames.device)
        for layer in self.convolutions:
            assert isinstance(layer, nn.Sequential)
            padded = frames.new_zeros((len(lengths) * max(lengths), frames.shape[1]))
            padded = padded.index_copy(0, places, frames).view(len(lengths), max(lengths), -1)
            convolve, *rest = layer.children()
            convolved = convolve(padded.transpose(1, 2)).transpose(1, 2)
            frames = convolved.flatten(0, 1).index_select(0, places)
            for part in rest:
                frames = part(frames)
        return frames


def _places(lengths: Sequence[int], device: torch.device) -> Tensor:
    """int64 `[N]`: the row of each token when every segment takes `max(lengths)` rows."""
    count = torch.tensor(lengths)
    starts = torch.tensor([0, *accumulate(lengths)][:-1])
    shift = (torch.arange(len(lengths)) * int(count.max()) - starts).repeat_interleave(count)
    return (torch.arange(sum(lengths)) + shift).to(device)

"""Writing frames one after the other: each is the input of the next, until the model says that it was the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.generate.config import GenerationConfig
from ofakern.generate.search import DecodeState

__all__ = ["FrameDecoder", "Frames", "generate_frames"]


class FrameDecoder(Protocol):
    """What writing frames needs of a model."""

    @property
    def frame_dim(self) -> int: ...

    def begin_decode(self, memory: Any, rows_per_sample: int, max_length: int) -> DecodeState: ...

    def decode_frame(self, state: Any, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The next frame `[rows, F]` and the probability `[rows]` that it is the last, given the one before."""
        ...

    def refine(self, frames: Tensor, lengths: Sequence[int]) -> Tensor:
        """Whole utterances' frames, end to end `[N, F]`, after the post-net."""
        ...


@dataclass(frozen=True)
class Frames:
    """One utterance: refined frames f32 `[T, F]` and the probability `[T]` that each is the last."""

    frames: Tensor
    stop: Tensor


@torch.inference_mode()
def generate_frames(
    model: FrameDecoder, memory: Any, batch_size: int, config: GenerationConfig, device: torch.device
) -> list[list[Frames]]:
    """For each of `batch_size` samples `config.num_return_sequences` utterances of at most `max_new_tokens` frames.

    An utterance ends with the first frame, from the `min_new_tokens`-th on, whose stop probability exceeds
    `config.stop_threshold`; it then leaves the batch. The model's pre-net draws its dropout from `config.seed`, so a
    call gives the same frames every time, and several utterances of one sample differ.
    """
    if config.max_new_tokens < 1:
        raise OfakernValueError(f"generate_frames: max_new_tokens must be at least 1, got {config.max_new_tokens}")
    count = config.num_return_sequences
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        found, stops = _write(model, memory, batch_size * count, count, config, device)
    lengths = [len(frames) for frames in found]
    if not found:
        return []
    whole = model.refine(torch.stack([frame for frames in found for frame in frames]), lengths).float()
    parts = torch.split(whole, lengths)
    done = [Frames(frames, torch.stack(stop)) for frames, stop in zip(parts, stops, strict=True)]
    return [done[b * count : (b + 1) * count] for b in range(batch_size)]


def _write(
    model: FrameDecoder, memory: Any, rows: int, count: int, config: GenerationConfig, device: torch.device
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Each row's frames and stop probabilities."""
    state = model.begin_decode(memory, count, config.max_new_tokens)
    found: list[list[Tensor]] = [[] for _ in range(rows)]
    stops: list[list[Tensor]] = [[] for _ in range(rows)]
    running = torch.arange(rows)
    frame = torch.zeros(rows, model.frame_dim, device=device)
    for step in range(config.max_new_tokens):
        frame, stop = model.decode_frame(state, frame)
        stop = stop.float().cpu()
        for place, row in enumerate(running.tolist()):
            found[row].append(frame[place])
            stops[row].append(stop[place])
        goes_on = (stop <= config.stop_threshold) | (step + 1 < config.min_new_tokens)
        if not goes_on.all():
            left = goes_on.nonzero()[:, 0]
            if not left.numel():
                break
            state.reorder(left)
            running, frame = running[left], frame[left.to(device)]
    return found, stops

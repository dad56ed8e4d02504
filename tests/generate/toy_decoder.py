"""A decoder whose next-token logits depend on its whole history, so a wrong reorder shows."""

from __future__ import annotations

import torch
from torch import Tensor


class ToyState:
    def __init__(self, samples: int, rows: int) -> None:
        self.sample = torch.arange(samples).repeat_interleave(rows)
        self.history = torch.empty(samples * rows, 0, dtype=torch.int64)

    def reorder(self, index: Tensor) -> None:
        assert torch.equal(self.sample[index], self.sample), "beams may not change their sample"
        self.history = self.history[index]


class ToyDecoder:
    def __init__(self, vocabulary: int = 12, seed: int = 0, scale: float = 2.0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.vocabulary = vocabulary
        self.table = torch.randn(997, vocabulary, generator=random) * scale

    def logits_after(self, sample: int, history: tuple[int, ...]) -> Tensor:
        key = sample + 1
        for token in history:
            key = (key * 31 + token + 7) % 997
        return self.table[key]

    def begin_decode(self, memory: int, rows_per_sample: int, max_length: int) -> ToyState:
        self.max_length = max_length
        return ToyState(memory, rows_per_sample)

    def decode_step(self, state: ToyState, tokens: Tensor) -> Tensor:
        state.history = torch.cat((state.history, tokens[:, None]), 1)
        assert state.history.shape[1] <= self.max_length
        rows = zip(state.sample.tolist(), state.history.tolist(), strict=True)
        return torch.stack([self.logits_after(sample, tuple(history)) for sample, history in rows])

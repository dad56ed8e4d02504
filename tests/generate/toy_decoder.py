"""A decoder whose next-token logits depend on its whole history, so a wrong reorder shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ToyState:
    def __init__(self, samples: Sequence[int], rows: int | Sequence[int]) -> None:
        self.sample = torch.tensor(samples).repeat_interleave(torch.tensor(rows))
        self.place = torch.arange(len(samples)).repeat_interleave(torch.tensor(rows))
        self.histories: list[tuple[int, ...]] = [()] * len(self.sample)

    def reorder(self, index: Tensor) -> None:
        self.place = self.place[index]
        assert bool((self.place.diff() >= 0).all()), "samples must stay together and in order"
        self.sample = self.sample[index]
        self.histories = [self.histories[row] for row in index.tolist()]


class JoiningState(ToyState):
    def join(self, other: JoiningState) -> None:
        self.place = torch.cat((self.place, other.place + 1 + self.place.max()))
        self.sample = torch.cat((self.sample, other.sample))
        self.histories += other.histories


class ToyDecoder:
    """memory: a count of samples, or their numbers: what a sample gets depends on its number alone."""

    state = ToyState

    def __init__(self, vocabulary: int = 12, seed: int = 0, scale: float = 2.0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.vocabulary = vocabulary
        self.table = torch.randn(997, vocabulary, generator=random) * scale
        self.rows_fed = 0

    def logits_after(self, sample: int, history: tuple[int, ...]) -> Tensor:
        key = sample + 1
        for token in history:
            key = (key * 31 + token + 7) % 997
        return self.table[key]

    def begin_decode(
        self, memory: int | Sequence[int], rows_per_sample: int | Sequence[int], max_length: int
    ) -> ToyState:
        self.max_length = max_length
        return self.state(range(memory) if isinstance(memory, int) else memory, rows_per_sample)

    def decode_step(self, state: ToyState, tokens: Tensor) -> Tensor:
        state.histories = [(*old, new) for old, new in zip(state.histories, tokens.tolist(), strict=True)]
        self.rows_fed += len(tokens)
        rows = zip(state.sample.tolist(), state.histories, strict=True)
        return torch.stack([self.logits_after(sample, history) for sample, history in rows])


class HiddenDecoder(ToyDecoder):
    """One that gives hidden states and the output projection: closed sets need no logits of the whole vocabulary."""

    def __init__(self, vocabulary: int, scale: float) -> None:
        super().__init__(vocabulary, scale=scale)
        self.output_weight = torch.eye(vocabulary)
        self.whole_steps = 0

    def decode_hidden(self, state: ToyState, tokens: Tensor) -> Tensor:
        return super().decode_step(state, tokens)

    def step_logits(self, state: ToyState, hidden: Tensor, ids: tuple[int, int] | None = None) -> Tensor:
        return hidden if ids is None else hidden[:, slice(*ids)]

    def decode_step(self, state: ToyState, tokens: Tensor) -> Tensor:
        self.whole_steps += 1
        return super().decode_step(state, tokens)


class JoiningDecoder(ToyDecoder):
    """One whose states can be joined, as the real model's."""

    state = JoiningState

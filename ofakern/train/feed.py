"""One task's micro-batches, in an order that a resumed run repeats exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Sampler

from ofakern.data.batch import PackedBatch
from ofakern.data.dataset import BrokenTally, LoadedBatch, TaskDataset, collate_samples


class RankBatches(Sampler[list[int]]):
    """Endless batches of consecutive positions from `start`; of every `world` batches this rank takes its own."""

    def __init__(self, batch_size: int, start: int, rank: int, world: int) -> None:
        self._batch_size, self._start, self._rank, self._world = batch_size, start, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        position = self._start + self._rank * self._batch_size
        while True:
            yield list(range(position, position + self._batch_size))
            position += self._world * self._batch_size


class Feed:
    """Micro-batches of one task.

    Attributes:
        position: samples all ranks have drawn since training began; everything needed to go on from here.
    """

    def __init__(
        self,
        dataset: TaskDataset,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        max_broken_share: float = 0.1,
        pad_to: int = 0,
    ) -> None:
        self.dataset = dataset
        self.position = 0
        self.tally = BrokenTally(max_broken_share, name=dataset.name)
        self._batch_size, self._rank, self._world, self._num_workers = batch_size, rank, world, num_workers
        self._pad_to = pad_to
        self._batches: Iterator[LoadedBatch] | None = None

    @property
    def epoch(self) -> float:
        """Passes over the rows so far."""
        return self.position / len(self.dataset)

    def draw(self) -> PackedBatch | None:
        """The next micro-batch; None when all its samples are broken. DataError when too many are."""
        if self._batches is None:
            self._batches = iter(self._loader())
        loaded = next(self._batches)
        self.position += self._batch_size * self._world
        self.tally.update(loaded)
        return loaded.batch

    def _loader(self) -> DataLoader[Any]:
        return DataLoader(
            self.dataset,
            batch_sampler=RankBatches(self._batch_size, self.position, self._rank, self._world),
            num_workers=self._num_workers,
            collate_fn=partial(collate_samples, pad_to=self._pad_to),
            multiprocessing_context="fork" if self._num_workers else None,
        )

    def close(self) -> None:
        """Stop the workers."""
        self._batches = None

    def state_dict(self) -> dict[str, Any]:
        """Position and broken samples, as plain values."""
        return {"position": self.position, "broken": self.tally.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.close()
        self.position = int(state["position"])
        self.tally.load_state_dict(state["broken"])

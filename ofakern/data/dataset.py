"""A task's samples by position: shuffled by epoch, resumed exactly, broken samples skipped and counted.

A *position* counts samples from the start of training: epoch = position // rows, and the order of an epoch depends on
the seed and the epoch only. So a loader that starts at position p continues exactly where a run of p samples stopped,
and what comes at a position does not depend on workers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from ofakern.data.batch import Example, PackedBatch
from ofakern.data.padding import pad_examples
from ofakern.data.readers import Rows
from ofakern.errors import DataError

__all__ = ["BrokenSample", "BrokenTally", "LoadedBatch", "PositionBatches", "TaskDataset", "collate_samples", "load"]

_log = logging.getLogger("ofakern.data")

Encode = Callable[[Mapping[str, Any], int, np.random.Generator], Example]
"""(row, its number, the sample's random generator) -> Example; raises DataError for a row that cannot be used."""


@dataclass(frozen=True)
class BrokenSample:
    """A row that could not be used: its number and the reason."""

    index: int
    reason: str


class TaskDataset(Dataset[Example | BrokenSample]):
    """Map-style data set over positions.

    rows: anything with a length and rows by number (`open_rows`); encode: row -> Example. shuffle: a new order each
    epoch. Raises DataError when there are no rows.
    """

    def __init__(self, rows: Rows, encode: Encode, *, seed: int = 0, shuffle: bool = True, name: str = "data") -> None:
        if len(rows) == 0:
            raise DataError(f"{name}: rows must hold at least one sample, got 0")
        self.rows, self.encode, self.seed, self.shuffle, self.name = rows, encode, seed, shuffle, name
        self._order: tuple[int, np.ndarray[Any, Any]] | None = None

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self.rows)

    def row_index(self, position: int) -> int:
        """The number of the row at `position`."""
        epoch, place = divmod(position, len(self.rows))
        if not self.shuffle:
            return place
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return int(self._order[1][place])

    def __getitem__(self, position: int) -> Example | BrokenSample:
        index = self.row_index(position)
        rng = np.random.default_rng([self.seed, position // len(self.rows), index, 1])
        try:
            return self.encode(self.rows[index], index, rng)
        except (DataError, OSError, UnicodeError) as error:  # OSError: data sets that decode files when indexed
            return BrokenSample(index, str(error))


@dataclass
class LoadedBatch:
    """A batch (None when every sample of it was broken), the broken samples, and how many samples were drawn."""

    batch: PackedBatch | None
    broken: tuple[BrokenSample, ...]
    seen: int


def collate_samples(samples: Sequence[Example | BrokenSample], pad_to: int = 0) -> LoadedBatch:
    """Packs the usable samples in order and lists the broken ones. pad_to: as `pad_examples` says; 0: not."""
    examples = [s for s in samples if isinstance(s, Example)]
    if pad_to and examples:
        examples = pad_examples(examples, pad_to)
    broken = tuple(s for s in samples if isinstance(s, BrokenSample))
    return LoadedBatch(PackedBatch.collate(examples) if examples else None, broken, len(samples))


class PositionBatches(Sampler[list[int]]):
    """Batches of consecutive positions in [start, stop); endless when stop is None."""

    def __init__(self, batch_size: int, start: int = 0, stop: int | None = None) -> None:
        if batch_size < 1 or start < 0:
            raise DataError(
                f"PositionBatches: batch_size must be positive and start not negative, got {batch_size} and {start}"
            )
        self.batch_size, self.start, self.stop = batch_size, start, stop

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start
        while self.stop is None or position < self.stop:
            end = position + self.batch_size if self.stop is None else min(position + self.batch_size, self.stop)
            yield list(range(position, end))
            position = end

    def __len__(self) -> int:
        if self.stop is None:
            raise TypeError("PositionBatches: an endless sampler has no length")
        return -(-max(self.stop - self.start, 0) // self.batch_size)


def load(
    dataset: TaskDataset, batch_size: int, *, start: int = 0, stop: int | None = None, num_workers: int = 0
) -> DataLoader[Any]:
    """A DataLoader of LoadedBatch over positions [start, stop); endless when stop is None."""
    return DataLoader(
        dataset,
        batch_sampler=PositionBatches(batch_size, start, stop),
        num_workers=num_workers,
        collate_fn=collate_samples,
        multiprocessing_context="fork" if num_workers else None,
        persistent_workers=False,
    )


class BrokenTally:
    """Counts broken samples in the main process; stops the run when too many are.

    max_share: the largest share of the samples seen that may be broken; min_count: below so many the run always goes
    on.
    """

    def __init__(self, max_share: float = 0.01, min_count: int = 10, *, name: str = "data") -> None:
        if not 0 <= max_share <= 1:
            raise DataError(f"BrokenTally: max_share must be in [0, 1], got {max_share}")
        self.max_share, self.min_count, self.name = max_share, min_count, name
        self.seen = 0
        self.broken: dict[int, str] = {}
        self.count = 0

    def update(self, loaded: LoadedBatch) -> None:
        """Counts one batch; every broken row is logged once. Raises DataError when more than `max_share` is broken."""
        self.seen += loaded.seen
        for sample in loaded.broken:
            self.count += 1
            if sample.index not in self.broken:
                self.broken[sample.index] = sample.reason
                _log.warning("%s: sample %d skipped: %s", self.name, sample.index, sample.reason)
        if self.count >= self.min_count and self.count > self.max_share * self.seen:
            self._fail(f"be at most {self.max_share:.2%} of those seen")

    def require_usable(self) -> None:
        """Raises DataError when samples were seen and every one was broken: nothing was learnt from them."""
        if self.seen and self.count == self.seen:
            self._fail("leave some sample to learn from")

    def _fail(self, rule: str) -> NoReturn:
        last = next(reversed(self.broken))
        raise DataError(
            f"{self.name}: broken samples must {rule}, got {self.count} of {self.seen}; the last: sample {last}: "
            f"{self.broken[last]}\nTry: repair the data, or allow a larger share."
        )

    def summary(self) -> str:
        """One line: how many of the samples seen were broken, and which rows."""
        if not self.count:
            return f"{self.name}: {self.seen} samples, none broken"
        rows = ", ".join(map(str, list(self.broken)[:10])) + (" ..." if len(self.broken) > 10 else "")
        return f"{self.name}: {self.seen} samples, {self.count} broken (rows {rows})"

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "count": self.count, "broken": {str(k): v for k, v in self.broken.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.count = int(state["seen"]), int(state["count"])
        self.broken = {int(k): str(v) for k, v in state["broken"].items()}

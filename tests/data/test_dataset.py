"""Order, exact resume, workers, broken samples."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from ofakern.data.batch import Example, Segment
from ofakern.data.dataset import (
    BrokenSample,
    BrokenTally,
    LoadedBatch,
    PositionBatches,
    TaskDataset,
    collate_samples,
    load,
)
from ofakern.errors import DataError

ROWS = [{"i": i} for i in range(23)]


def encode(row: Mapping[str, Any], index: int, rng: np.random.Generator) -> Example:
    """Labels: the row and a random number, so that order and randomness both show."""
    if row["i"] in (5, 11):
        raise DataError(f"row {index}: broken on purpose")
    value = torch.tensor([0, index], dtype=torch.int64)
    labels = torch.tensor([index, int(rng.integers(1 << 30))])
    return Example([Segment(0, "text", 1, value)], [Segment(1, "text", 1, value)], labels)


def drawn(dataset: TaskDataset, start: int, stop: int, workers: int = 0) -> list[Any]:
    found: list[Any] = []
    for loaded in load(dataset, 4, start=start, stop=stop, num_workers=workers):
        found += [] if loaded.batch is None else loaded.batch.labels.tolist()
        found += [b.index for b in loaded.broken]
    return found


def test_every_epoch_is_a_new_permutation() -> None:
    dataset = TaskDataset(ROWS, encode, seed=3)
    epochs = [[dataset.row_index(e * 23 + i) for i in range(23)] for e in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] == [TaskDataset(ROWS, encode, seed=3).row_index(i) for i in range(23)]
    assert epochs[0] != [TaskDataset(ROWS, encode, seed=4).row_index(i) for i in range(23)]
    plain = TaskDataset(ROWS, encode, shuffle=False)
    assert [plain.row_index(i) for i in range(46)] == list(range(23)) * 2


def test_order_and_noise_do_not_depend_on_workers() -> None:
    dataset = TaskDataset(ROWS, encode, seed=1)
    alone = drawn(dataset, 0, 60)
    assert drawn(dataset, 0, 60, workers=1) == alone
    assert drawn(dataset, 0, 60, workers=2) == alone


def test_resume_is_exact() -> None:
    dataset = TaskDataset(ROWS, encode, seed=1)
    assert drawn(dataset, 0, 20) + drawn(TaskDataset(ROWS, encode, seed=1), 20, 60, workers=2) == drawn(dataset, 0, 60)


def test_noise_changes_from_epoch_to_epoch() -> None:
    dataset = TaskDataset(ROWS, encode, shuffle=False)
    first, second = dataset[0], dataset[23]
    assert isinstance(first, Example) and isinstance(second, Example)
    assert first.labels[0] == second.labels[0] and first.labels[1] != second.labels[1]


def test_broken_samples_are_reported_and_skipped(caplog: pytest.LogCaptureFixture) -> None:
    dataset = TaskDataset(ROWS, encode, shuffle=False, name="toy")
    assert dataset[5] == BrokenSample(5, "row 5: broken on purpose")
    tally = BrokenTally(0.5, name="toy")
    with caplog.at_level(logging.WARNING, "ofakern.data"):
        for loaded in load(dataset, 4, stop=46):
            tally.update(loaded)
    assert (tally.seen, tally.count) == (46, 4)
    assert [r.getMessage() for r in caplog.records] == [
        f"toy: sample {i} skipped: row {i}: broken on purpose" for i in (5, 11)
    ]
    assert tally.summary() == "toy: 46 samples, 4 broken (rows 5, 11)"
    again = BrokenTally(0.5, name="toy")
    again.load_state_dict(tally.state_dict())
    assert again.summary() == tally.summary()


def test_only_bad_data_is_a_broken_sample() -> None:
    def wrong(row: Mapping[str, Any], index: int, rng: np.random.Generator) -> Example:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        TaskDataset(ROWS, wrong)[0]


def batch_of(good: int, bad: int) -> LoadedBatch:
    return LoadedBatch(None, tuple(BrokenSample(i, "why") for i in range(bad)), good + bad)


def test_the_run_stops_above_the_share_and_not_before() -> None:
    tally = BrokenTally(0.01, 10, name="toy")
    tally.update(batch_of(100, 9))  # above the share, but too few to judge
    tally.update(batch_of(891, 1))  # 10 of 1001: within the share
    with pytest.raises(DataError, match=r"toy: broken samples must be at most 1.00% .* got 11 of 1002; .*why"):
        tally.update(batch_of(0, 1))
    with pytest.raises(DataError, match="max_share must be in"):
        BrokenTally(2.0)


def test_all_broken_batch_and_bad_arguments() -> None:
    loaded = collate_samples([BrokenSample(1, "x")])
    assert loaded.batch is None and loaded.seen == 1
    with pytest.raises(DataError, match="at least one sample"):
        TaskDataset([], encode)
    with pytest.raises(DataError, match="batch_size must be positive"):
        PositionBatches(0)
    assert len(PositionBatches(4, 2, 11)) == 3
    endless = iter(PositionBatches(4, 2))
    assert next(endless) == [2, 3, 4, 5]
    with pytest.raises(TypeError):
        len(PositionBatches(4))

"""Inputs of a step in one block of memory."""

from __future__ import annotations

import numpy as np
import torch

from ofakern.ops.staged import Entry, Staged


def test_values_fill_a_corner_and_the_rest_is_the_fill() -> None:
    def entries(step: int) -> dict[str, Entry]:
        return {
            "ids": Entry(np.arange(step, dtype=np.int32), (5,), -1),
            "table": Entry(np.full((step, 2), step, np.int32), (3, 20)),
            "scores": Entry(np.full(2, step + 0.5, np.float32), (2,)),
            "penalty": Entry(np.zeros(0, np.float32), (3,), 1.0),
            "none": Entry(np.zeros(0, np.int32), (0,)),
        }

    staged = Staged(entries(1), torch.device("cpu"))
    given = dict(staged.tensors)
    for step in (2, 3, 1):  # what was there before does not stay
        staged.send(entries(step))
        assert given["ids"].tolist() == [*range(step), *[-1] * (5 - step)]
        table = torch.zeros(3, 20, dtype=torch.int32)
        table[:step, :2] = step
        assert torch.equal(given["table"], table)
        assert given["scores"].tolist() == [step + 0.5] * 2 and given["penalty"].tolist() == [1.0] * 3
        assert given["none"].numel() == 0
    assert all(tensor.data_ptr() % 64 == given["ids"].data_ptr() % 64 for tensor in given.values() if tensor.numel())

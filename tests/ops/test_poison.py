"""That poisoned memory is seen: else the tests that rely on it could not fail."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned
from short import SANITIZED


@pytest.mark.skipif(SANITIZED, reason="malloc is the sanitizer's")
def test_new_memory_is_neither_zero_nor_old() -> None:
    def made() -> list[torch.Tensor]:
        return [torch.empty(50, 63), torch.ones(50, 63), torch.empty(50, 63)]

    first, ones, again = poisoned(made)
    assert bool(ones.eq(1).all())
    for tensor in (first, again):
        assert tensor.view(torch.uint8).unique().tolist() == [0xC0]


def test_errors_come_out() -> None:
    with pytest.raises(ZeroDivisionError):
        poisoned(lambda: 1 / 0)

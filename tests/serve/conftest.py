import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "checkpoint")]  # the small model of the checkpoint tests


@pytest.fixture(scope="session")
def model() -> Any:
    """A `GeneralistModel` that knows some scenes; engines of different tests have it one after the other."""
    from site_model import trained_model

    return trained_model()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors here are tiny: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

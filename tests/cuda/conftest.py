"""Where the CUDA kernels run: emulated wherever the toolkit was at build, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import emulate
import pytest
import torch


@pytest.fixture(params=["emulated", "gpu"])
def cuda_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device whose tensors backend "cuda" takes in this test: the CPU when the kernels are emulated."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("torch sees no GPU here")
        yield torch.device("cuda")
        return
    if (reason := emulate.unavailable()) is not None:
        pytest.skip(reason)
    with emulate.emulated():
        yield torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""Fixtures of the op tests: the compiled module must be there, and each instruction set is forced in turn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from ofakern.ops import backends, native

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "avx512_amx")


@pytest.fixture
def cpu() -> ModuleType:
    """The compiled module with attention in it. Its absence is a failure: a suite without kernels proves nothing."""
    reason = backends("attention")["cpu"]
    if reason is not None or native.cpu is None:
        pytest.fail(f"no CPU kernel: {reason}")
    return native.cpu


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, cpu: ModuleType) -> Iterator[str]:
    """Forces an instruction set for the test."""
    name = str(request.param)
    if name not in cpu.supported_isas():
        pytest.skip(f"this machine has no {name}")
    if name not in cpu.compiled_isas() and "OFAKERN_TEST_CPU_MODULE" in os.environ:
        pytest.skip(f"this build for tests has no {name}")
    before = cpu.isa()
    cpu.set_isa(name)
    yield name
    cpu.set_isa(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads; tests about threads set their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""Fixtures of the op tests: the compiled module must be there, and each instruction set is forced in turn."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


def _replace_module(path: str) -> None:
    """Another build of ofakern._cpu (the sanitizers' one) takes the installed one's place."""
    spec = importlib.util.spec_from_file_location("ofakern._cpu", path)
    assert spec is not None and spec.loader is not None
    sys.modules["ofakern._cpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["ofakern._cpu"])


if "OFAKERN_TEST_CPU_MODULE" in os.environ:
    _replace_module(os.environ["OFAKERN_TEST_CPU_MODULE"])

from ofakern.ops import backends, native  # noqa: E402

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "avx512_amx")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes, not part of the suite (run with -m slow)")
    config.addinivalue_line(
        "markers", "sanitize: builds with ASan and UBSan and runs the op tests (run with -m sanitize)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.option.markexpr
    skipped = [
        item for item in items for mark in ("slow", "sanitize") if item.get_closest_marker(mark) and mark not in asked
    ]
    if skipped:
        config.hook.pytest_deselected(items=skipped)
        items[:] = [item for item in items if item not in skipped]


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

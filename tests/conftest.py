"""What every test shares: the threads it may use, and what runs only when asked."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch
from hypothesis import settings
from short import SHORT, pairwise

# Markers (pyproject.toml) of what takes minutes or other tools: `pytest -m slow`, `make sanitize`, `make arm`.
ON_REQUEST = ("slow", "sanitize", "aarch64")

# The same cases on every machine; nothing is stored.
settings.register_profile("ofakern", derandomize=True, database=None)
settings.load_profile("ofakern")

# Workers of a parallel run have a core each: more threads than cores would wait for one another.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def _replace_cpu_module(path: str) -> None:
    """Another build of ofakern._cpu (the sanitizers' one) takes the installed one's place."""
    spec = importlib.util.spec_from_file_location("ofakern._cpu", path)
    assert spec is not None and spec.loader is not None
    sys.modules["ofakern._cpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["ofakern._cpu"])


if "OFAKERN_TEST_CPU_MODULE" in os.environ:
    _replace_cpu_module(os.environ["OFAKERN_TEST_CPU_MODULE"])


def _parameters(item: pytest.Item) -> dict[str, object]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else dict(callspec.params)


def _left_out_of_a_short_run(items: list[pytest.Item]) -> list[pytest.Item]:
    from ofakern import _cpu

    left_out, tests = [], dict[str, list[pytest.Item]]()
    for item in items:
        # What is not in this build would be skipped, and must not stand for a pair.
        if _parameters(item).get("isa", "scalar") not in _cpu.compiled_isas():
            left_out.append(item)
        else:
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in tests.values():
        kept = set(pairwise([_parameters(item) for item in cases]))
        left_out += [item for n, item in enumerate(cases) if n not in kept]
    return left_out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marks = [mark for mark in ON_REQUEST if mark not in config.option.markexpr]
    skipped = {item for item in items if any(item.get_closest_marker(mark) for mark in marks)}
    if SHORT:
        skipped |= set(_left_out_of_a_short_run([item for item in items if item not in skipped]))
    if skipped:
        config.hook.pytest_deselected(items=list(skipped))
        items[:] = [item for item in items if item not in skipped]

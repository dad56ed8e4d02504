"""The benchmarks' cases under pytest-benchmark: `pytest benchmarks/ --benchmark-only`.

`ofakern bench` is the one that compares in turn and knows the roofline; this is for a single case while working on a
kernel (`-k "attention and ofa_base_enc_1024-bf16"`) and for pytest-benchmark's own --benchmark-compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import catalogue, run
from benchmarks.core import OpBench, Phase, Unavailable

_OPS = {name: catalogue.load(name) for name in catalogue.names()}


def _cases() -> Iterator[Any]:
    for op in _OPS.values():
        for spec in (spec for spec in op.cases.values() if spec.default):
            for dtype in op.dtypes:
                yield pytest.param(op, spec, dtype, id=f"{op.name}-{spec.name}-{dtype}")


def _timed() -> Iterator[Any]:
    for case in _cases():
        op, spec, dtype = case.values
        for phase in op.phases_of(spec):
            for contender in (name for name in op.contenders if name not in op.slow):
                yield pytest.param(op, spec, dtype, phase, contender, id=f"{case.id}-{phase}-{contender}")


@pytest.mark.parametrize(("op", "spec", "dtype"), _cases())
def test_right_before_timed(op: OpBench, spec: Any, dtype: str) -> None:
    run.check(op, spec, dtype, catalogue.load_harness(op.harness))


@pytest.mark.parametrize(("op", "spec", "dtype", "phase", "contender"), _timed())
def test_time(op: OpBench, spec: Any, dtype: str, phase: Phase, contender: str, benchmark: Any) -> None:
    if contender == op.ours:
        run.check(op, spec, dtype, catalogue.load_harness(op.harness))
    try:
        call = op.contenders[contender](op.make(spec, dtype)).call(phase)
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark.group = f"{op.name} {spec.name} {dtype} {phase}"
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)

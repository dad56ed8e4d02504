"""The benchmark's cases under pytest-benchmark: `pytest benchmarks/ --benchmark-only`.

`ofakern bench` is the one that compares in turn and knows the roofline; this is for a single case while working on a
kernel (`-k ofa_base_enc_1024-bf16`) and for pytest-benchmark's own --benchmark-compare.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import run
from benchmarks.core import PHASES, Phase, Unavailable

_OP = run.load_op("attention")
_CASES = [spec for spec in _OP.CASES.values() if spec.default]


@pytest.fixture(scope="module")
def harness() -> Any:
    return run.load_harness()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("spec", _CASES, ids=lambda spec: spec.name)
def test_right_before_timed(spec: Any, dtype: str, harness: Any) -> None:
    run.check(_OP, spec, dtype, harness)


@pytest.mark.parametrize("contender", [name for name in _OP.CONTENDERS if name not in _OP.SLOW_CONTENDERS])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("spec", _CASES, ids=lambda spec: spec.name)
def test_attention(spec: Any, dtype: str, phase: Phase, contender: str, benchmark: Any, harness: Any) -> None:
    if contender == next(iter(_OP.CONTENDERS)):
        run.check(_OP, spec, dtype, harness)
    try:
        call = _OP.CONTENDERS[contender](_OP.make(spec, dtype)).call(phase)
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark.group = f"attention {spec.name} {dtype} {phase}"
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)

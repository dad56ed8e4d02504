"""Runs triton_cases.py: interpreted everywhere, and compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ofakern.ops import backends, explain
from ofakern.ops.attention import AttentionLayout, attention, intervals

ROOT = Path(__file__).resolve().parents[2]


def run_cases(*options: str, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "tests/ops/triton_cases.py"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_interpreted() -> None:
    pytest.importorskip("triton")
    run_cases("-p", "no:xdist", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the compiled kernels cannot run here")
def test_on_a_gpu() -> None:
    # Each case compiles its kernels: most of the time is spent in triton's compiler, on one core each.
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    run_cases(*(["-n", str(workers)] if find_spec("xdist") else []))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_without_a_gpu_the_reason_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    layout = AttentionLayout.build(intervals.full([4]), [4], [4])
    q, k, v = (torch.ones(4, 1, 8) for _ in range(3))
    reason = backends("attention")["triton"]
    assert reason is not None and reason.startswith(("not yet run on a GPU", "triton is not installed"))
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this call"):
        attention(q, k, v, layout, backend="triton")
    assert "chosen" in explain("attention", q, k, v, layout).splitlines()[1]

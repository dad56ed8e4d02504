"""Runs triton_cases.py: interpreted everywhere, and compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from triton_setup import run_interpreted, run_on_gpu

from ofakern.ops import backends, explain
from ofakern.ops.attention import AttentionLayout, attention, intervals


def test_interpreted() -> None:
    pytest.importorskip("triton")
    run_interpreted("triton_cases.py")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the compiled kernels cannot run here")
def test_on_a_gpu() -> None:
    run_on_gpu("triton_cases.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_without_a_gpu_the_reason_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    layout = AttentionLayout.build(intervals.full([4]), [4], [4])
    q, k, v = (torch.ones(4, 1, 8) for _ in range(3))
    reason = backends("attention")["triton"]
    assert reason is not None and reason.startswith(("not yet run on a GPU", "triton is not installed"))
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this call"):
        attention(q, k, v, layout, backend="triton")
    assert "chosen" in explain("attention", q, k, v, layout).splitlines()[1]

"""The root-mean-square norm's Triton kernels against the float64 oracle; test_triton_ops.py runs this file."""

from __future__ import annotations

import pytest
import torch
from harness import poisoned_empty
from test_rms_norm import check, inputs, run
from torch import Tensor
from triton_setup import DTYPES, INTERPRETED, to_device

from ofakern.ops import triton_rows
from ofakern.ops.rms_norm import rms_norm

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of lanes that are masked


def run_triton(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Every new tensor starts as NaN, so that a result left unwritten shows."""
    moved = to_device(tensors)
    with poisoned_empty():
        found = run(rms_norm, *moved, backend="triton")
    return tuple(tensor.cpu() for tensor in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(0, 5), (1, 1), (37, 48), (130, 65), (3, 4097)])
def test_kernels_keep_the_rule(rows: int, width: int, dtype: torch.dtype) -> None:
    case = inputs(rows, width, dtype, seed=width)
    check(*case, run_triton(*case))


def test_views_are_read_as_they_stand() -> None:
    x, weight, dout = inputs(24, 40, torch.float32)
    x, dout = x.t().contiguous().t(), dout[:1].expand(24, 40)
    check(x, weight, dout, run_triton(x, weight, dout))


def test_several_tiles_per_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "_PARTS", 3)
    case = inputs(50, 300, torch.float32)
    check(*case, run_triton(*case))


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels keep what they were compiled from")
def test_a_lost_tile_breaks_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    case = inputs(50, 300, torch.float32)
    monkeypatch.setattr(triton_rows, "partition", lambda tiles: (1, tiles - 1))
    with pytest.raises(AssertionError):
        check(*case, run_triton(*case))


@pytest.mark.skipif(INTERPRETED, reason="minutes when interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [768, 4096])
def test_model_widths(width: int, dtype: torch.dtype) -> None:
    case = inputs(1500, width, dtype)
    check(*case, run_triton(*case))


def test_same_bits_every_time() -> None:
    case = inputs(70, 42, torch.float16)
    for first, again in zip(run_triton(*case), run_triton(*case), strict=True):
        assert torch.equal(first, again)


def test_the_registered_ops() -> None:
    x, weight, dout = to_device(inputs(7, 24, torch.float32))
    ways = [getattr(torch.ops.ofakern, f"rms_norm_{way}_triton").default for way in ("fwd", "bwd")]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ways[0], (x, weight, 1e-6), test_utils=checks)
    torch.library.opcheck(ways[1], (dout, x, ways[0](x, weight, 1e-6)[1], weight), test_utils=checks)

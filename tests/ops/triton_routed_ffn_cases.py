"""routed_linear's Triton kernels against the float64 oracle; test_triton_ops.py runs this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import poisoned_empty
from rule import assert_kept
from test_routed_ffn import Case, _absolute, make_case, run
from torch import Tensor
from triton_setup import DEVICE, DTYPES, INTERPRETED, to_device

from ofakern.ops.routed_ffn import kernel_triton, routed_ffn

CASES: dict[str, dict[str, Any]] = {
    "plain": {"counts": (40,), "width": 33, "out": 50, "bias": False, "sorted_in": True, "sorted_out": True},
    "everything": {"counts": (5, 0, 70), "width": 40, "out": 70},
    "grouping only": {"counts": (31, 33), "width": 64, "out": 16, "sorted_out": True},
    "undoing only": {"counts": (3, 64), "width": 1, "out": 1, "sorted_in": True},
    "no tokens": {"counts": (0, 0), "width": 8, "out": 9},
}


def run_triton(case: Case) -> list[Tensor]:
    moved = Case(*(to_device(part) for part in case))
    with poisoned_empty():
        return [result.cpu() for result in run(moved, "triton", case.x.dtype)]


def check(case: Case, call: Callable[[Case], list[Tensor]] = run_triton) -> None:
    dtype = case.x.dtype
    have, exact, peer = call(case), run(case, "reference", torch.float64), run(case, "reference", dtype)
    sizes = run(Case(*(_absolute(part) for part in case)), "reference", torch.float64)  # type: ignore[arg-type]
    for n, parts in enumerate(zip(have, exact, peer, sizes, strict=True)):
        assert_kept(f"result {n}", *parts, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_keep_the_rule(name: str, dtype: torch.dtype) -> None:
    check(make_case(len(name), **CASES[name], dtype=dtype))


@pytest.mark.skipif(INTERPRETED, reason="minutes when interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_blocks(dtype: torch.dtype) -> None:
    check(make_case(3, (700, 0, 333), 768, 3072, dtype))


def test_same_bits_every_time() -> None:
    case = make_case(4, (20, 30), 40, 24, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(run_triton(case), run_triton(case), strict=True))


def test_the_layer() -> None:
    """Two routed maps with the gelu and LayerNorm between them, all in Triton."""
    g = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(DEVICE)

    x, expert = normal(12, 8), torch.tensor([0, 1, 2] * 4)
    maps = ([normal(*shape) for _ in range(3)] for shape in ((16, 8), (16,), (8, 16), (8,)))
    arguments = (x, expert, *maps, normal(16), normal(16))
    have, want = (routed_ffn(*arguments, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_an_index_out_of_range_reaches_no_memory() -> None:
    """A place whose source is none counts as zeros; one whose target is none is not written."""
    x, weight = torch.randn(4, 8, device=DEVICE), [torch.randn(8, 8, device=DEVICE)]
    source = torch.tensor([0, 2**40, -1, 3], device=DEVICE)
    y = torch.ops.ofakern.routed_linear_fwd_triton(x, weight, [], [4], source, None)
    torch.testing.assert_close(y[[0, 3]], x[[0, 3]] @ weight[0].T, rtol=1e-4, atol=1e-5)
    assert not bool(y[1:3].any())


def test_the_registered_ops() -> None:
    case = make_case(6, (3, 4), 8, 9)
    moved = Case(*(to_device(part) for part in case))
    index, checks = (moved.source, moved.target), ("test_schema", "test_faketensor")
    inputs = (moved.x, moved.weights, moved.biases, moved.counts, *index)
    ops = torch.ops.ofakern
    torch.library.opcheck(ops.routed_linear_fwd_triton.default, inputs, test_utils=checks)
    wanted = (moved.dy, moved.x, moved.weights, moved.counts, *index, True, True, True)
    torch.library.opcheck(ops.routed_linear_bwd_triton.default, wanted, test_utils=checks)


def _swapped(name: str, tensor: Tensor, index: Tensor | None, first: int, end: int) -> dict[str, Any]:
    return _side(name, tensor, None if index is None else index.flip(0), first, end)


def _one_place_less(counts: Any) -> Any:
    for e, first, end in _experts(counts):
        yield e, first, max(first, end - 1)


_side, _experts = kernel_triton._side, kernel_triton._experts
WRONG: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "another permutation": lambda patch: patch.setattr(kernel_triton, "_side", _swapped),
    "a token of each expert is lost": lambda patch: patch.setattr(kernel_triton, "_experts", _one_place_less),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_launches_break_the_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    WRONG[name](monkeypatch)
    with pytest.raises(AssertionError):
        check(make_case(7, (20, 11), 16, 24))

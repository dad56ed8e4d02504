"""cross_entropy's Triton kernels against the float64 oracle; test_triton_ops.py runs this file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from cross_entropy_cases import Case, check, make_case, run
from harness import poisoned_empty
from torch import Tensor
from triton_setup import DEVICE, DTYPES, INTERPRETED, to_device

from ofakern.ops.cross_entropy import cross_entropy, kernel_triton
from ofakern.ops.cross_entropy.triton_kernels import gradient, losses

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of lanes that are masked

CASES: dict[str, dict[str, Any]] = {
    "plain": {"tokens": 37, "width": 40, "vocabulary": 150, "bias": False, "ignored": 0.0, "epsilon": 0.0},
    "everything": {"tokens": 70, "width": 33, "vocabulary": 201, "allowed": "rows", "strides": "strided"},
    "range": {"tokens": 40, "width": 64, "vocabulary": 300, "allowed": "range"},
    "one range": {"tokens": 40, "width": 16, "vocabulary": 300, "allowed": "one_range", "bias": False},
    "subset": {"tokens": 20, "width": 24, "vocabulary": 90, "allowed": "subset"},
    "one id": {"tokens": 5, "width": 8, "vocabulary": 1},
    "no tokens": {"tokens": 0, "width": 8, "vocabulary": 9, "bias": False},
}


def run_triton(case: Case, reduction: str) -> dict[str, Tensor]:
    moved = replace(case, **{name: to_device(value) for name, value in vars(case).items()})
    with poisoned_empty():
        found = run(moved, "triton", case.hidden.dtype, reduction)
    return {name: result.cpu() for name, result in found.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_keep_the_rule(name: str, dtype: torch.dtype) -> None:
    reduction = "sum" if len(name) % 2 else "none"
    check(make_case(len(name), **CASES[name], dtype=dtype), reduction, run_triton)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_several_chunks_and_splits(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_triton, "_CHUNK_TOKENS", 32)
    monkeypatch.setattr(kernel_triton, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(kernel_triton, "_PROGRAMS", 2)
    check(make_case(5, 70, 20, 300, allowed="rows"), reduction, run_triton)


@pytest.mark.skipif(INTERPRETED, reason="minutes when interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("allowed", ["all", "rows", "range"])
def test_many_blocks(allowed: str, dtype: torch.dtype) -> None:
    check(make_case(6, 700, 768, 5003, dtype=dtype, allowed=allowed), "sum", run_triton)


def test_same_bits_every_time() -> None:
    case = make_case(7, 40, 24, 130, torch.float16)
    first, again = run_triton(case, "sum"), run_triton(case, "sum")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_large_scores_do_not_overflow() -> None:
    case = make_case(8, 30, 24, 130)
    check(replace(case, hidden=case.hidden * 100), "none", run_triton)


def test_a_label_that_is_not_allowed_is_infinite() -> None:
    hidden, weight = (torch.randn(n, 8, device=DEVICE) for n in (2, 12))
    labels = torch.tensor([7, 3], device=DEVICE)
    out = cross_entropy(hidden, weight, labels, allowed_range=(2, 5), reduction="none", backend="triton")
    want = cross_entropy(hidden, weight, labels, allowed_range=(2, 5), reduction="none", backend="reference")
    torch.testing.assert_close(out.loss, want.loss)
    assert out.loss.isinf().tolist() == [True, False]


def test_equal_scores_give_the_first_id() -> None:
    hidden, weight = torch.ones(3, 8, device=DEVICE), torch.zeros(400, 8, device=DEVICE)
    labels = torch.tensor([0, 1, -100], device=DEVICE)
    out = cross_entropy(hidden, weight, labels, return_best=True, backend="triton")
    assert out.best is not None and out.best.tolist() == [0, 0, -100]


def test_the_registered_ops() -> None:
    case = make_case(9, 6, 8, 20)
    given = to_device((case.hidden, case.weight, case.bias, case.labels))
    inputs = (*given, None, None, None, 0, 0.1)
    ops, checks = torch.ops.ofakern, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.cross_entropy_fwd_triton.default, (*inputs, True), test_utils=checks)
    wanted = (False, True, True, True)
    torch.library.opcheck(ops.cross_entropy_sum_triton.default, (*inputs, *wanted), test_utils=checks)
    loss, _, lse, _ = ops.cross_entropy_fwd_triton(*inputs, False)
    torch.library.opcheck(
        ops.cross_entropy_bwd_triton.default, (torch.ones_like(loss), lse, *inputs, *wanted[1:]), test_utils=checks
    )


@triton.jit
def _all_allowed(ranges, range_stride, always, mask, vocabulary, there, ident, valid, ALLOWED: tl.constexpr, N, V):  # type: ignore[no-untyped-def]
    return there[:, None] & valid[None, :]


def _one_id_more(chunk: Any, tokens: int) -> Tensor:
    return _counts(chunk, tokens) + 1


_counts = kernel_triton._counts
WRONG: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "losses of ids that are not allowed": lambda patch: patch.setattr(losses, "allowed_tile", _all_allowed),
    "gradients of ids that are not allowed": lambda patch: patch.setattr(gradient, "allowed_tile", _all_allowed),
    "an id more is allowed": lambda patch: patch.setattr(kernel_triton, "_counts", _one_id_more),
}


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels keep what they were compiled from")
@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_break_the_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(10, 30, 16, 70, allowed="range")
    WRONG[name](monkeypatch)
    with pytest.raises(AssertionError):
        check(case, "none", run_triton)

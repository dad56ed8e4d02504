"""The fused LayerNorms' Triton kernels against the float64 oracle; test_triton_ops.py runs this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from harness import poisoned_empty
from layer_norm_cases import OPS, Case, check, make_case, run
from torch import Tensor
from triton_setup import DEVICE, DTYPES, INTERPRETED, to_device

from ofakern.ops import triton_rows
from ofakern.ops.layer_norm import add_layer_norm, embed_layer_norm, gelu_layer_norm
from ofakern.ops.layer_norm.triton_kernels import backward, forward, rows

# Heads divide the width; rows and widths around powers of two, of one tile and of several.
CASES: dict[str, dict[str, Any]] = {
    "add": {"op": "add", "rows": 37, "width": 48},
    "add, everything": {"op": "add", "rows": 35, "width": 130, "dropout_p": 0.3, "strided": True},
    "add, one column": {"op": "add", "rows": 3, "width": 1, "dropout_p": 0.5},
    "add, total only": {"op": "add", "rows": 17, "width": 64, "dropout_p": 0.1, "total_only": True},
    "gelu": {"op": "gelu", "rows": 37, "width": 65},
    "gelu, everything": {"op": "gelu", "rows": 130, "width": 31, "half_parameters": True, "strided": True},
    "head scale": {"op": "head_scale", "rows": 33, "width": 48, "heads": 3},
    "head scale, everything": {"op": "head_scale", "rows": 9, "width": 96, "heads": 1, "half_parameters": True},
    "embed": {"op": "embed", "rows": 37, "width": 48, "types": "one"},
    "embed, no types": {"op": "embed", "rows": 5, "width": 63, "types": "none"},
    "embed, everything": {"op": "embed", "rows": 65, "width": 33, "types": "many"},
}


def run_triton(case: Case) -> dict[str, Tensor]:
    """Every new tensor starts as NaN, so that a result left unwritten shows."""
    moved = Case(case.op, *(to_device(part) for part in (case.leaves, case.douts)), case.dtype, to_device(case.options))
    with poisoned_empty():
        found = run(moved, OPS[case.op][0], backend="triton")
    return {name: tensor.cpu() for name, tensor in found.items()}


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of lanes that are masked


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_keep_the_rule(name: str, dtype: torch.dtype) -> None:
    check(make_case(seed=len(name), **CASES[name], dtype=dtype), run_triton)


@pytest.mark.parametrize("op", sorted(OPS))
def test_no_rows(op: str) -> None:
    check(make_case(op, rows=0, width=12), run_triton)


@pytest.mark.parametrize("op", sorted(OPS))
def test_several_tiles_per_program(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "_PARTS", 3)
    case = make_case(op, 4, rows=50, width=600 if op == "add" else 300, dropout_p=0.2, types="many")
    check(case, run_triton)


@pytest.mark.skipif(INTERPRETED, reason="minutes when interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("width", [768, 3072, 5120])
def test_model_widths(op: str, width: int, dtype: torch.dtype) -> None:
    check(
        make_case(op, 4, rows=1500, width=width, heads=width // 64, dropout_p=0.1, types="many", dtype=dtype),
        run_triton,
    )


def test_same_bits_every_time() -> None:
    for op in OPS:
        case = make_case(op, 3, rows=70, width=42, dropout_p=0.2, types="many", dtype=torch.float16)
        first, again = run_triton(case), run_triton(case)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_dropout_masks_equal_the_reference() -> None:
    """On ones and a residual of zeros the sum shows what was kept."""
    x = torch.ones(20, 72, device=DEVICE)
    parameters = (torch.ones(72, device=DEVICE), torch.zeros(72, device=DEVICE))
    options: dict[str, Any] = {"dropout_p": 0.3, "dropout_seed": torch.tensor([-(2**63), 2**63 - 1], device=DEVICE)}
    _, total = add_layer_norm(x, torch.zeros_like(x), *parameters, **options, backend="triton")
    _, want = add_layer_norm(x, torch.zeros_like(x), *parameters, **options, backend="reference")
    assert torch.equal(total, want)


def test_gelu_keeps_its_digits_in_the_tail() -> None:
    x = torch.linspace(-6, -3, 512, device=DEVICE)[None]
    unit, zero = torch.ones(512, device=DEVICE), torch.zeros(512, device=DEVICE)
    z = torch.special.ndtr(x.double()) * x.double()
    want = (z - z.mean()) * torch.rsqrt(z.var(unbiased=False))
    assert float((gelu_layer_norm(x, unit, zero, eps=0.0, backend="triton") - want).abs().max()) < 1e-5


def test_gelu_gradient_far_out() -> None:
    x = torch.tensor([[-1e30, -300.0, -20.0, 0.0, 20.0, 300.0, -13.0, 1.0]], device=DEVICE, requires_grad=True)
    weight = torch.linspace(-1, 1, 8, device=DEVICE)[None]
    unit, zero = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    found = []
    for backend in ("triton", "reference"):
        out = gelu_layer_norm(x, unit, zero, backend=backend)
        found.append((out.detach(), *torch.autograd.grad(out, x, weight)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


def test_nan_stays_in_its_row() -> None:
    case = make_case("add", 6, rows=9, width=33)
    case.leaves["x"][4] = torch.nan
    out = run_triton(case)["out0"]
    assert out.isnan().all(1).tolist() == [row == 4 for row in range(9)]
    assert bool(out[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all())


def test_an_index_out_of_range_is_a_row_of_nan() -> None:
    table = torch.randn(5, 16, device=DEVICE, requires_grad=True)
    weight, bias = torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE)
    tokens = torch.tensor([0, 5, 3, -1, 2**40], device=DEVICE)
    out = embed_layer_norm(tokens, table, weight, bias, backend="triton")
    assert out.isnan().all(1).tolist() == [False, True, False, True, True]
    assert bool(out[[0, 2]].isfinite().all())
    kinds = torch.tensor([0, 1, 0, 0, 0], device=DEVICE)
    typed = embed_layer_norm(tokens.clamp(0, 4), table, weight, bias, table[:1], kinds, backend="triton")
    assert typed.isnan().all(1).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("op", sorted(OPS))
def test_the_registered_ops(op: str) -> None:
    from test_layer_norm_torch import backward_inputs, op_inputs

    case = make_case(op, 1, rows=5, width=12, dropout_p=0.25, types="many")
    case = Case(case.op, to_device(case.leaves), to_device(case.douts), case.dtype, to_device(case.options))
    ways = [getattr(torch.ops.ofakern, f"{op}_layer_norm_{way}_triton").default for way in ("fwd", "bwd")]
    inputs, checks = op_inputs(case), ("test_schema", "test_faketensor")
    torch.library.opcheck(ways[0], inputs, test_utils=checks)
    torch.library.opcheck(ways[1], backward_inputs(case, ways[0](*inputs)), test_utils=checks)


@triton.jit
def _twice_centred(dout, xhat, weight, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    a, b = rows.row_means(dout, xhat, weight, WIDTH)
    return a + a, b


@triton.jit
def _keep_all(seed, row, threshold, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.full([ROWS, BLOCK], 1, tl.int1)


def _last_part_lost(tiles: int) -> tuple[int, int]:
    return 1, max(tiles - 1, 1)


WRONG: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "mean of the gradient twice": ("gelu", lambda patch: patch.setattr(backward, "row_means", _twice_centred)),
    "dropout keeps everything": ("add", lambda patch: patch.setattr(forward, "row_keep", _keep_all)),
    "dropout keeps every gradient": ("add", lambda patch: patch.setattr(backward, "row_keep", _keep_all)),
    "a tile is lost": ("head_scale", lambda patch: patch.setattr(triton_rows, "partition", _last_part_lost)),
}


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels keep what they were compiled from")
@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_break_the_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, wrong = WRONG[name]
    case = make_case(op, 2, rows=40, width=24, dropout_p=0.3)
    check(case, run_triton)
    wrong(monkeypatch)
    with pytest.raises(AssertionError):
        check(case, run_triton)

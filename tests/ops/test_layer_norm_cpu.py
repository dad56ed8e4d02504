"""The fused LayerNorm kernels against the float64 oracle, for every instruction set that this machine has."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from layer_norm_cases import DTYPES, OPS, check, make_case, run_cpu
from poison import poisoned
from short import examples

from ofakern.ops.layer_norm import add_layer_norm, gelu_layer_norm

pytestmark = pytest.mark.usefixtures("cpu")
ROWS = (0, 1, 2, 15, 16, 17, 65, 130)
WIDTHS = (1, 2, 3, 15, 16, 17, 31, 48, 63, 64, 65, 96, 129)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of make_case that a kernel must take."""
    op = draw(st.sampled_from(sorted(OPS)))
    heads = draw(st.sampled_from((1, 2, 3)))
    width = draw(st.sampled_from(WIDTHS))
    return {
        "op": op,
        "seed": draw(st.integers(0, 2**30)),
        "rows": draw(st.sampled_from(ROWS)),
        "width": width * heads if op == "head_scale" else width,
        "heads": heads,
        "dtype": draw(st.sampled_from(DTYPES)),
        "dropout_p": draw(st.sampled_from((0.0, 0.1, 0.6))),
        "total_only": draw(st.booleans()),
        "types": draw(st.sampled_from(("none", "one", "many"))),
        "strided": draw(st.booleans()),
        "half_parameters": draw(st.booleans()),
    }


@settings(
    max_examples=examples(70),
    deadline=None,
    derandomize=True,  # the same cases on every machine; nothing is stored
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(calls())
@example({"op": "add", "rows": 130, "width": 96, "dropout_p": 0.1, "dtype": torch.bfloat16})
@example({"op": "gelu", "rows": 130, "width": 129, "dtype": torch.float16})
@example({"op": "embed", "rows": 130, "width": 65, "types": "many"})
def test_kernels_keep_the_rule(isa: str, arguments: dict[str, Any]) -> None:
    check(make_case(**arguments))


@pytest.mark.parametrize("op", sorted(OPS))
def test_bits_do_not_depend_on_threads_or_repetition(isa: str, op: str) -> None:
    case = make_case(op, 3, rows=700, width=96, dropout_p=0.2, types="many", dtype=torch.bfloat16)
    first = run_cpu(case)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        again = run_cpu(case)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_dropout_masks_equal_the_reference(isa: str) -> None:
    """On ones and a residual of zeros the sum shows what was kept, beyond one group of 64 columns."""
    x = torch.ones(40, 200)
    parameters = (torch.ones(200), torch.zeros(200))
    options = {"dropout_p": 0.3, "dropout_seed": torch.tensor([-(2**63), 2**63 - 1])}
    _, total = add_layer_norm(x, torch.zeros_like(x), *parameters, **options, backend="cpu")
    _, want = add_layer_norm(x, torch.zeros_like(x), *parameters, **options, backend="reference")
    assert torch.equal(total, want)
    assert 0.65 < float((total != 0).float().mean()) < 0.75


def test_dropout_seeds_come_from_the_default_generator() -> None:
    x = torch.randn(20, 64)
    parameters = (torch.ones(64), torch.zeros(64))

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return add_layer_norm(x, x, *parameters, dropout_p=0.5, backend="cpu")[1]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_gelu_keeps_its_digits_in_the_tail(isa: str) -> None:
    """Below -3 the GELU is tiny and 0.5 * (1 + erf) has few digits of it; the norm scales the row up and shows them."""
    x = torch.linspace(-6, -3, 512)[None]
    unit, zero = torch.ones(512), torch.zeros(512)
    z = torch.special.ndtr(x.double()) * x.double()
    want = (z - z.mean()) * torch.rsqrt(z.var(unbiased=False))
    out = gelu_layer_norm(x, unit, zero, eps=0.0, backend="cpu")
    assert float((out - want).abs().max()) < 1e-5


def test_gelu_and_its_slope(isa: str) -> None:
    """A row (x, 0) under a huge eps shows both to their last digits: out is z / 2 and dx half the slope, scaled."""
    bounds = torch.arange(31) / 5  # and around them: of the pieces that AVX-512 looks up
    x = torch.cat([torch.linspace(-8, 8, 3201), bounds + 0.1, bounds.neg() - 0.1, torch.tensor([1e-30, -1e-30, 0.0])])
    rows = torch.stack([x, torch.zeros_like(x)], 1).requires_grad_()
    out = gelu_layer_norm(rows, torch.ones(2), torch.zeros(2), eps=1e12, backend="cpu")
    (dx,) = torch.autograd.grad(out, rows, torch.tensor([1.0, 0.0]).expand_as(out))
    value, slope = 2e6 * out.detach()[:, 0].double(), 2e6 * dx[:, 0].double()
    wide = x.double()
    below = torch.special.ndtr(wide)
    error = (value - wide * below).abs()
    assert torch.all(error <= 5e-7 * wide.clamp(min=0) + 5e-6 * (wide * below).abs() + 4e-9 * (wide < -6))
    exact = below + wide * torch.exp(-wide * wide / 2) * (2 * torch.pi) ** -0.5
    assert float((slope - exact).abs().max()) < 5e-7


def test_gelu_gradient_far_out(isa: str) -> None:
    """Beyond the range of the exponential the slope is exactly 0 or 1, and infinities stay out of it."""
    x = torch.tensor([[-1e30, -300.0, -20.0, 0.0, 20.0, 300.0, -13.0, 1.0]], requires_grad=True)
    out = gelu_layer_norm(x, torch.ones(8), torch.zeros(8), backend="cpu")
    want = gelu_layer_norm(x, torch.ones(8), torch.zeros(8), backend="reference")
    torch.testing.assert_close(out, want)
    weight = torch.linspace(-1, 1, 8)[None]
    (got,), (exact,) = torch.autograd.grad(out, x, weight), torch.autograd.grad(want, x, weight)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_results_equal_cached_ones(dtype: torch.dtype) -> None:
    """Arrays beyond the caches take other store instructions; rows are independent, so parts give the same bits."""
    width = 4096
    rows = (16 << 20) // (width * dtype.itemsize) + 3
    x = torch.randn(rows, width).to(dtype)
    parameters = {"weight": torch.randn(width), "bias": torch.randn(width)}
    out, total = add_layer_norm(x, x * 2, **parameters, backend="cpu")
    few = add_layer_norm(x[:64], x[:64] * 2, **parameters, backend="cpu")
    assert torch.equal(out[:64], few[0])
    assert torch.equal(total[:64], few[1])
    leaf = x.clone().requires_grad_()
    out = gelu_layer_norm(leaf, **parameters, backend="cpu")
    (dx,) = torch.autograd.grad(out, leaf, x)
    part = x[-64:].clone().requires_grad_()
    few_out = gelu_layer_norm(part, **parameters, backend="cpu")
    (few_dx,) = torch.autograd.grad(few_out, part, x[-64:])
    assert torch.equal(out[-64:], few_out)
    assert torch.equal(dx[-64:], few_dx)


def test_every_element_is_written(isa: str) -> None:
    for op in OPS:
        case = make_case(op, 5, rows=50, width=63, dropout_p=0.5)
        want = run_cpu(case)
        got = poisoned(partial(run_cpu, case))
        for name in want:
            assert torch.equal(got[name], want[name]), (op, name)


def test_nan_stays_in_its_row(isa: str) -> None:
    case = make_case("add", 6, rows=9, width=33)
    case.leaves["x"][4] = torch.nan
    out = run_cpu(case)["out0"]
    assert bool(out[4].isnan().all())
    assert bool(out[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all())

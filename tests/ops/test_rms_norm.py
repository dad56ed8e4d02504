"""The root-mean-square norm: the kernel against the float64 oracle, torch's machinery, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from poison import poisoned
from rule import assert_kept
from short import examples
from torch import Tensor

import ofakern
from ofakern.errors import OfakernError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.ops.rms_norm import rms_norm
from ofakern.ops.rms_norm.reference import rms_norm_reference

pytestmark = pytest.mark.usefixtures("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6
NAMES = ("out", "dx", "dweight")


def run(function: Any, x: Tensor, weight: Tensor, dout: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    out = function(*leaves, EPS, **options)
    dx, dweight = torch.autograd.grad(out, leaves, dout)
    return out.detach(), dx, dweight


def plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As torch users write it, every step in x's dtype."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def inputs(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    x, dout = (torch.randn(rows, width, generator=gen).to(dtype) for _ in range(2))
    return x * 3 + 1, 1 + 0.3 * torch.randn(width, generator=gen), dout


def check(x: Tensor, weight: Tensor, dout: Tensor, have: tuple[Tensor, ...]) -> None:
    exact = run(rms_norm_reference, x.double(), weight.double(), dout.double())
    peer = run(plain, x, weight, dout)
    z, w, d = x.double().abs(), weight.double().abs(), dout.double().abs()
    rstd = torch.rsqrt(z.square().mean(-1, keepdim=True) + EPS)
    xhat = z * rstd
    sizes = (xhat * w, rstd * (d * w + xhat * (d * w * xhat).mean(-1, keepdim=True)), (d * xhat).sum(0))
    for name, *parts in zip(NAMES, have, exact, peer, sizes, strict=True):
        assert_kept(name, *parts, x.dtype)


@settings(
    max_examples=examples(40),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.sampled_from((0, 1, 2, 15, 17, 65, 130)),
    st.sampled_from((1, 2, 15, 16, 17, 31, 63, 64, 65, 96, 129, 257)),
    st.sampled_from(DTYPES),
    st.booleans(),
)
@example(130, 257, torch.bfloat16, False)
def test_kernel_keeps_the_rule(isa: str, rows: int, width: int, dtype: torch.dtype, strided: bool) -> None:
    x, weight, dout = inputs(rows, width, dtype, seed=rows)
    if strided:
        x, dout = x.t().contiguous().t(), dout.t().contiguous().t()
    check(x, weight, dout, run(rms_norm, x, weight, dout, backend="cpu"))


def test_the_rule_bites() -> None:
    x, weight, dout = inputs(40, 24, torch.float32)
    right = run(rms_norm, x, weight, dout, backend="cpu")
    for place, name in enumerate(NAMES):
        wrong = tuple(part * 1.001 if n == place else part for n, part in enumerate(right))
        with pytest.raises(AssertionError, match=name):
            check(x, weight, dout, wrong)


def test_bits_do_not_depend_on_threads(isa: str) -> None:
    x, weight, dout = inputs(700, 96, torch.bfloat16)
    first = run(rms_norm, x, weight, dout, backend="cpu")
    for threads in (1, 3, 5):
        torch.set_num_threads(threads)
        again = run(rms_norm, x, weight, dout, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_every_element_is_written_and_nan_stays_in_its_row(isa: str) -> None:
    x, weight, dout = inputs(50, 63, torch.float32)
    want = run(rms_norm, x, weight, dout, backend="cpu")
    got = poisoned(lambda: run(rms_norm, x, weight, dout, backend="cpu"))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    x[4] = torch.nan
    out = rms_norm(x, weight, backend="cpu")
    assert bool(out[4].isnan().all())
    assert int(out.isnan().any(1).sum()) == 1


def test_streamed_results_equal_cached_ones() -> None:
    """Arrays beyond the caches take other store instructions; rows are independent, so parts give the same bits."""
    x, weight, dout = inputs((16 << 20) // (4096 * 4) + 3, 4096, torch.float32)
    out, dx, _ = run(rms_norm, x, weight, dout, backend="cpu")
    few_out, few_dx, _ = run(rms_norm, x[-64:], weight, dout[-64:], backend="cpu")
    assert torch.equal(out[-64:], few_out)
    assert torch.equal(dx[-64:], few_dx)


def test_reference() -> None:
    x, weight, dout = (tensor.double() for tensor in inputs(4, 6, torch.float32))
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    assert torch.autograd.gradcheck(rms_norm_reference, leaves)
    torch.testing.assert_close(rms_norm_reference(x, weight), torch.nn.functional.rms_norm(x, (6,), weight, EPS))
    half = x.bfloat16()
    assert rms_norm_reference(half, weight).dtype == torch.bfloat16


def test_opcheck_compile_and_autocast() -> None:
    x, weight, dout = inputs(7, 24, torch.float32)
    forward, backward = (getattr(torch.ops.ofakern, f"rms_norm_{way}").default for way in ("fwd", "bwd"))
    torch.library.opcheck(forward, (x, weight, EPS))
    torch.library.opcheck(backward, (dout, x, forward(x, weight, EPS)[1], weight))
    torch._dynamo.reset()
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager", dynamic=True)
    for got, want in zip(run(compiled, x, weight, dout), run(rms_norm, x, weight, dout), strict=True):
        torch.testing.assert_close(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rms_norm(x, weight).dtype == torch.float32  # torch's rms_norm keeps x's dtype too
    assert rms_norm(x, weight).grad_fn is None


def test_shapes_and_views() -> None:
    x, weight, _ = inputs(24, 16, torch.float32)
    flat = rms_norm(x, weight, backend="cpu")
    assert torch.equal(rms_norm(x.view(2, 3, 4, 16), weight, backend="cpu").view(24, 16), flat)
    assert torch.equal(rms_norm(x[0], weight, backend="cpu"), flat[0])
    assert torch.equal(rms_norm(torch._neg_view(-x), weight, backend="cpu"), flat)
    out, _, dweight = run(rms_norm, x[:0], weight, x[:0], backend="cpu")
    assert out.shape == (0, 16)
    assert not dweight.any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, w: rms_norm(x.int(), w), OfakernTypeError, "x must be float32"),
        (lambda x, w: rms_norm(x.tolist(), w), OfakernTypeError, "x must be a tensor, got list"),
        (lambda x, w: rms_norm(x[0, 0], w), OfakernValueError, r"x must have shape \[..., D\]"),
        (lambda x, w: rms_norm(x, w[:3]), OfakernValueError, r"weight must have shape \[D = 16\], got \[3\]"),
        (lambda x, w: rms_norm(x, w.to("meta")), OfakernValueError, "weight must be on x's device"),
        (lambda x, w: rms_norm(x, w, float("nan")), OfakernValueError, "eps must be at least 0, got nan"),
        (lambda x, w: rms_norm(x, w, backend="gpu"), OfakernValueError, "backend must be one of"),
    ],
)
def test_bad_arguments_are_told(call: Any, error: type[OfakernError], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(3, 16), torch.ones(16))


def test_second_derivatives_and_vmap_are_refused() -> None:
    x, weight = torch.randn(2, 16, requires_grad=True), torch.ones(16)
    (grad,) = torch.autograd.grad(rms_norm(x, weight, backend="cpu").square().sum(), x, create_graph=True)
    with pytest.raises(OfakernRuntimeError, match="double backward"):
        grad.sum().backward()
    with pytest.raises(OfakernRuntimeError, match="under vmap"):
        torch.vmap(lambda row: rms_norm(row, weight, backend="cpu"))(torch.randn(3, 2, 16))
    assert "runs on 'reference'" in ofakern.explain(
        "rms_norm", torch.randn(2, 16, dtype=torch.float64), weight.double()
    )

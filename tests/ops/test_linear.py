"""The linear layer's gradient: the kernel against the float64 oracle, torch's machinery, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from poison import poisoned
from rule import assert_kept
from short import examples
from torch import Tensor

import ofakern
from ofakern.errors import (
    BackendError,
    OfakernError,
    OfakernRuntimeError,
    OfakernTypeError,
    OfakernValueError,
)
from ofakern.ops import native
from ofakern.ops.linear import linear
from ofakern.ops.linear.reference import linear_reference

pytestmark = pytest.mark.usefixtures("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("y", "dx", "dweight", "dbias")


def inputs(rows: int, out: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """x, weight, bias, dy."""
    gen = torch.Generator().manual_seed(seed)
    shapes = (rows, width), (out, width), (out,), (rows, out)
    return tuple((torch.randn(shape, generator=gen) + 0.25).to(dtype) for shape in shapes)


def run(function: Any, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, **options: Any) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    y = function(*leaves, **options)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def check(given: tuple[Tensor, ...], have: tuple[Tensor, ...]) -> None:
    x, weight, bias, dy = (tensor.double() for tensor in given)
    exact = run(F.linear, x, weight, bias, dy)
    peer = run(F.linear, *given)
    sizes = run(F.linear, *(tensor.abs() for tensor in (x, weight, bias, dy)))
    for name, *parts in zip(NAMES, have, exact, peer, sizes, strict=True):
        assert_kept(name, *parts, given[0].dtype)


@settings(
    max_examples=examples(60),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.sampled_from((0, 1, 2, 15, 31, 32, 33, 130, 400, 801)),
    st.sampled_from((1, 2, 15, 31, 32, 33, 47, 48, 49, 97)),
    st.sampled_from((1, 2, 15, 16, 17, 31, 63, 64, 65, 130)),
    st.sampled_from(DTYPES),
    st.integers(1, 5),
)
@example(801, 97, 130, torch.bfloat16, 1)
@example(801, 97, 130, torch.float16, 3)
@example(0, 33, 17, torch.bfloat16, 1)
def test_kernel_keeps_the_rule(isa: str, rows: int, out: int, width: int, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    given = inputs(rows, out, width, dtype, seed=rows)
    check(given, run(linear, *given, backend="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "width"), [(800, 40), (40, 800), (1600, 1600)])
def test_more_than_one_block(out: int, width: int, dtype: torch.dtype) -> None:
    """The kernel's blocks are at most 768 wide and high."""
    given = inputs(70, out, width, dtype)
    check(given, run(linear, *given, backend="cpu"))


@pytest.mark.parametrize("place", range(4))
def test_the_rule_bites(place: int) -> None:
    given = inputs(60, 24, 40, torch.float32)
    right = run(linear, *given, backend="cpu")
    check(given, right)
    wrong = tuple(part * 1.001 if n == place else part for n, part in enumerate(right))
    with pytest.raises(AssertionError, match=NAMES[place]):
        check(given, wrong)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(isa: str, dtype: torch.dtype) -> None:
    given = inputs(700, 96, 200, dtype)
    first = run(linear, *given, backend="cpu")
    for threads in (2, 3, 16):
        torch.set_num_threads(threads)
        again = run(linear, *given, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(first[2:], again[2:], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_is_written_and_nan_stays_in_its_column(isa: str, dtype: torch.dtype) -> None:
    """What pads a block must neither be read nor reach a neighbour."""
    given = inputs(401, 70, 50, dtype)
    want = run(linear, *given, backend="cpu")
    got = poisoned(lambda: run(linear, *given, backend="cpu"))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    x, weight, bias, dy = given
    x[400, 7] = torch.nan
    dweight = run(linear, x, weight, bias, dy, backend="cpu")[2]
    assert bool(dweight[:, 7].isnan().all())
    assert int(dweight.isnan().any(0).sum()) == 1


def test_views_and_shapes() -> None:
    x, weight, bias, dy = inputs(600, 40, 24, torch.bfloat16)
    want = run(linear, x, weight, bias, dy, backend="cpu")
    folded = run(linear, x.view(2, 3, 100, 24), weight, bias, dy.view(2, 3, 100, 40), backend="cpu")
    assert torch.equal(folded[0].view(600, 40), want[0])
    assert all(torch.equal(a, b) for a, b in zip(folded[2:], want[2:], strict=True))
    turned = run(linear, x.t().contiguous().t(), weight, bias, dy.t().contiguous().t(), backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(turned[2:], want[2:], strict=True))
    row = x[0].detach().requires_grad_()
    weight.requires_grad_()
    linear(row, weight, bias, backend="cpu").sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, x[0].expand(40, 24))


WANTED = [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]


@pytest.mark.parametrize("wanted", WANTED)
def test_only_what_is_wanted(wanted: tuple[bool, ...]) -> None:
    *leaves, dy = inputs(300, 40, 24, torch.bfloat16)
    whole = run(linear, *leaves, dy, backend="cpu")[1:]
    leaves = [leaf.detach().requires_grad_(wants) for leaf, wants in zip(leaves, wanted, strict=True)]
    linear(*leaves, backend="cpu").backward(dy)
    for leaf, grad, wants in zip(leaves, whole, wanted, strict=True):
        assert (leaf.grad is not None) == wants
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, grad, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24)])
def test_one_gradient_of_all_that_are_asked_for(shape: tuple[int, ...]) -> None:
    """autograd.grad by one leaf of a call whose other leaves learn too."""
    leaves = [torch.randn(size).requires_grad_() for size in (shape, (40, 24), (40,))]
    dy = torch.randn(*shape[:-1], 40)
    for leaf in leaves:
        (have,) = torch.autograd.grad(linear(*leaves, backend="cpu"), leaf, dy)
        (want,) = torch.autograd.grad(F.linear(*leaves), leaf, dy)
        torch.testing.assert_close(have, want)


def test_auto_takes_the_kernel_where_it_is_faster() -> None:
    def chosen(rows: int, dtype: torch.dtype = torch.bfloat16, learns: bool = True) -> bool:
        x, weight, bias, _ = inputs(rows, 8, 16, dtype)
        y = linear(x.requires_grad_(), weight.requires_grad_(learns), bias)
        return "_Linear" in type(y.grad_fn).__name__

    amx = native.kernels.isa() == "avx512_amx"
    assert chosen(512) == amx
    assert not chosen(511)
    assert not chosen(512, torch.float32)
    assert not chosen(512, learns=False)
    with torch.no_grad():
        assert not chosen(512)
    x, weight, bias, _ = inputs(512, 8, 16, torch.bfloat16)
    assert f"runs on {'cpu' if amx else 'reference'!r}" in ofakern.explain("linear", x, weight.requires_grad_(), bias)


def test_opcheck_compile_and_autocast() -> None:
    given = inputs(300, 40, 24, torch.float32)
    x, weight, bias, dy = given
    for with_bias in (True, False):
        torch.library.opcheck(torch.ops.ofakern.linear_bwd.default, (dy, x, with_bias))
    torch._dynamo.reset()
    for backend in ("cpu", "auto"):
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=True)
        for case in (given, tuple(tensor.bfloat16() for tensor in given)):
            for got, want in zip(
                run(compiled, *case, backend=backend), run(linear, *case, backend=backend), strict=True
            ):
                torch.testing.assert_close(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, weight.requires_grad_(), bias.requires_grad_(), backend="cpu")
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_reference() -> None:
    leaves = [tensor.double().requires_grad_() for tensor in inputs(5, 3, 4, torch.float32)[:3]]
    assert torch.autograd.gradcheck(linear_reference, leaves)
    assert torch.equal(linear(*leaves), F.linear(*leaves))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, w, b: linear(x.tolist(), w, b), OfakernTypeError, "x must be a tensor, got list"),
        (lambda x, w, b: linear(x.int(), w, b), OfakernTypeError, "x must be float32"),
        (lambda x, w, b: linear(x, w.bfloat16(), b), OfakernTypeError, r"weight must have x's dtype \(torch.float32\)"),
        (lambda x, w, b: linear(x, w[0], b), OfakernValueError, r"weight must have shape \[O, I\], got \[16\]"),
        (lambda x, w, b: linear(x[:, :3], w, b), OfakernValueError, r"x must have shape \[..., I = 16\], got \[3, 3\]"),
        (lambda x, w, b: linear(x, w, b[:2]), OfakernValueError, r"bias must have shape \[O = 5\], got \[2\]"),
        (lambda x, w, b: linear(x, w.to("meta"), b), OfakernValueError, "weight must be on x's device"),
        (lambda x, w, b: linear(x, w, b, backend="gpu"), OfakernValueError, "backend must be one of"),
        (lambda x, w, b: linear(x, w, b, backend="triton"), BackendError, "no Triton kernel for linear"),
        (lambda x, w, b: linear(x.double(), w.double(), backend="cpu"), BackendError, "takes float32, bfloat16"),
    ],
)
def test_bad_arguments_are_told(call: Any, error: type[OfakernError], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(3, 16), torch.randn(5, 16), torch.randn(5))


def test_the_binding_checks_as_strictly() -> None:
    kernels, dy, x = native.kernels, torch.randn(4, 5), torch.randn(4, 3)
    room = torch.empty(kernels.linear_backward_workspace(dy, x, 1), dtype=torch.uint8)
    dweight, dbias = torch.empty(5, 3), torch.empty(5)
    kernels.linear_backward(dweight, dbias, room, dy, x, 1)
    torch.testing.assert_close(dweight, dy.t() @ x)
    torch.testing.assert_close(dbias, dy.sum(0))
    with pytest.raises(OfakernValueError, match=r"dweight must have shape \[O, I\]"):
        kernels.linear_backward(dweight.t(), None, room, dy, x, 1)
    with pytest.raises(OfakernValueError, match="workspace must"):
        kernels.linear_backward(dweight, None, room[:8], dy, x, 1)
    with pytest.raises(OfakernTypeError, match="dy must"):
        kernels.linear_gradients(dy.bfloat16(), x, True, 1)
    with pytest.raises(OfakernValueError, match="O must be at least 1"):
        kernels.linear_gradients(dy[:, :0], x, True, 1)


def test_second_derivatives_and_vmap_are_refused() -> None:
    x, weight, bias, _ = inputs(4, 3, 16, torch.float32)
    weight.requires_grad_()
    (grad,) = torch.autograd.grad(linear(x, weight, bias, backend="cpu").square().sum(), weight, create_graph=True)
    with pytest.raises(OfakernRuntimeError, match="double backward"):
        grad.sum().backward()
    with pytest.raises(OfakernRuntimeError, match="under vmap"):
        torch.vmap(lambda rows: linear(rows, weight, bias, backend="cpu"))(torch.randn(3, 2, 16))

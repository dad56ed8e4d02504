"""6-D rotations: the kernel against the float64 oracle, what a rotation is, and torch's machinery."""

from __future__ import annotations

import pytest
import torch
from rotation_6d_rule import assert_rule, run

import ofakern
from ofakern.errors import OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.ops.rotation_6d import rotation_6d, rotation_6d_of
from ofakern.ops.rotation_6d.reference import rotation_6d_reference

pytestmark = pytest.mark.usefixtures("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (15,), (16,), (17,), (3, 50)], ids=str)
def test_kernel_keeps_the_rule(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(len(shape))
    x, dout = torch.randn(*shape, 6).to(dtype), torch.randn(*shape, 3, 3).to(dtype)
    assert_rule(*run(rotation_6d, x, dout, backend="cpu"), x, dout)


def test_results_are_rotations_and_come_back() -> None:
    x = torch.randn(200, 6)
    matrix = rotation_6d(x, backend="cpu")
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(3).expand(200, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(200))
    torch.testing.assert_close(rotation_6d(rotation_6d_of(matrix)), matrix, atol=1e-5, rtol=0)
    quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert rotation_6d_of(quarter).tolist() == [0.0, 1.0, 0.0, -1.0, 0.0, 0.0]
    assert torch.equal(rotation_6d(torch.tensor([0.0, 2.0, 0.0, -3.0, 1.0, 0.0])), quarter)


def test_no_direction_is_finite(isa: str) -> None:
    x = torch.tensor([[0.0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 0, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0]])
    dout = torch.ones(4, 3, 3)
    out, dx = run(rotation_6d, x, dout, backend="cpu")
    want, want_dx = run(rotation_6d_reference, x, dout)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(dx, want_dx)


def test_bits_do_not_depend_on_threads() -> None:
    x, dout = torch.randn(20000, 6), torch.randn(20000, 3, 3)
    first = run(rotation_6d, x, dout, backend="cpu")
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(first, run(rotation_6d, x, dout, backend="cpu"), strict=True))


def test_opcheck_and_compile() -> None:
    x, dout = torch.randn(7, 6), torch.randn(7, 3, 3)
    torch.library.opcheck(torch.ops.ofakern.rotation_6d_fwd.default, (x,))
    torch.library.opcheck(torch.ops.ofakern.rotation_6d_bwd.default, (dout, x))
    torch._dynamo.reset()
    compiled = torch.compile(rotation_6d, fullgraph=True, backend="aot_eager", dynamic=True)
    for got, want in zip(run(compiled, x, dout), run(rotation_6d, x, dout), strict=True):
        torch.testing.assert_close(got, want)


def test_gradients_of_the_reference_and_of_the_way_back() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotation_6d_reference, x)
    assert torch.autograd.gradcheck(lambda x: rotation_6d_of(rotation_6d(x)), x)


def test_strides_and_negative_views() -> None:
    x = torch.randn(6, 9).t()
    want = rotation_6d(x.contiguous(), backend="cpu")
    assert torch.equal(rotation_6d(x, backend="cpu"), want)
    assert torch.equal(rotation_6d(torch._neg_view(-x), backend="cpu"), want)


def test_what_is_refused() -> None:
    with pytest.raises(OfakernValueError, match=r"x must have shape \[..., 6\], got \[3, 5\]"):
        rotation_6d(torch.randn(3, 5))
    with pytest.raises(OfakernTypeError, match="x must be float32"):
        rotation_6d(torch.ones(3, 6, dtype=torch.int32))
    with pytest.raises(OfakernValueError, match=r"matrix must have shape \[..., 3, 3\]"):
        rotation_6d_of(torch.randn(3, 2))
    x = torch.randn(2, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(rotation_6d(x, backend="cpu").sum(), x, create_graph=True)
    with pytest.raises(OfakernRuntimeError, match="double backward"):
        grad.sum().backward()
    with pytest.raises(OfakernRuntimeError, match="under vmap"):
        torch.vmap(lambda x: rotation_6d(x, backend="cpu"))(torch.randn(3, 2, 6))
    assert "runs on 'reference'" in ofakern.explain("rotation_6d", torch.randn(2, 6, dtype=torch.float64))

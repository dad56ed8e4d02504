"""The fused cross entropy against its float64 oracle, on every instruction set, and among torch's machinery."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import DTYPES, check, make_case, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from short import examples
from torch import Tensor

from ofakern import explain
from ofakern.errors import BackendError, OfakernError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.ops import native
from ofakern.ops.cross_entropy import cross_entropy

ALLOWED = ("all", "rows", "range", "one_range", "subset")


@pytest.fixture(autouse=True)
def _kernels(cpu: Any) -> None:
    """Without the compiled module every test here fails."""


@settings(
    max_examples=examples(25),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    case=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**30),
            "tokens": st.sampled_from((1, 2, 31, 63, 64, 65, 130)),
            "width": st.sampled_from((1, 7, 16, 33, 64, 100)),
            "vocabulary": st.sampled_from((1, 2, 31, 255, 256, 257, 600)),
            "dtype": st.sampled_from(DTYPES),
            "bias": st.booleans(),
            "ignored": st.sampled_from((0.0, 0.5, 1.0)),
            "allowed": st.sampled_from(ALLOWED),
            "epsilon": st.sampled_from((0.0, 0.1, 0.9)),
            "strides": st.sampled_from(("contiguous", "strided")),
        }
    ),
    reduction=st.sampled_from(("sum", "none")),
)
def test_the_kernel_keeps_the_rule(isa: str, case: dict[str, Any], reduction: str) -> None:
    check(make_case(**case), reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_several_chunks_of_tokens(dtype: torch.dtype, reduction: str) -> None:
    check(make_case(3, tokens=1500, width=16, vocabulary=260, dtype=dtype), reduction)


def test_torch_has_the_same_function_with_another_epsilon() -> None:
    case = make_case(4, bias=False)
    n = case.weight.shape[0]
    ours = cross_entropy(case.hidden, case.weight, case.labels, epsilon=0.1, backend="cpu")
    theirs = F.cross_entropy(
        case.hidden @ case.weight.T, case.labels, reduction="sum", label_smoothing=0.1 * n / (n - 1)
    )
    torch.testing.assert_close(ours.loss, theirs)


def test_large_scores(isa: str) -> None:
    case = make_case(5, width=32, allowed="rows")
    check(replace(case, hidden=case.hidden * 300))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_bits_do_not_depend_on_threads(isa: str, dtype: torch.dtype, reduction: str) -> None:
    case = make_case(6, tokens=150, vocabulary=3000, width=24, dtype=dtype, allowed="range")
    first = run(case, "cpu", dtype, reduction)
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        again = run(case, "cpu", dtype, reduction)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_results_are_written_whole(isa: str) -> None:
    """Into memory full of NaN, blocks that no token may choose and unlabelled tokens included."""
    case = make_case(7, tokens=40, vocabulary=1000, allowed="one_range", ignored=0.5)
    limits = torch.tensor([case.options["allowed_range"]], dtype=torch.int32)
    inputs = (case.hidden, case.weight, case.bias, case.labels, None, None, limits, 0, 0.1)
    floats = [torch.full((40,), torch.nan) for _ in range(3)]
    best = torch.full((40,), -7)
    assert case.bias is not None
    grads = [torch.full_like(x, torch.nan) for x in (case.hidden, case.weight, case.bias)]
    assert native.cpu is not None
    size = native.cpu.cross_entropy_forward_workspace(*floats, best, *grads, *inputs, 1)
    native.cpu.cross_entropy_forward(*floats, best, *grads, torch.full((size,), 255, dtype=torch.uint8), *inputs, 1)
    assert not any(x.isnan().any() for x in (*floats, *grads)) and not (best == -7).any()


def test_no_token_and_no_label() -> None:
    for tokens in (0, 5):
        labels = torch.full((tokens,), -100)
        hidden, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
        for backend in ("cpu", "reference"):
            out = cross_entropy(hidden, weight, labels, epsilon=0.1, backend=backend)
            grads = torch.autograd.grad(out.loss, (hidden, weight))
            assert float(out.loss.detach()) == float(out.nll) == int(out.tokens) == 0
            assert not any(torch.any(grad) for grad in grads)


def test_a_label_that_is_not_allowed() -> None:
    hidden, weight = torch.randn(2, 8), torch.randn(9, 8)
    out = cross_entropy(hidden, weight, torch.tensor([1, 4]), allowed_range=(3, 6), reduction="none", backend="cpu")
    assert out.loss[0] == torch.inf and out.nll[0] == torch.inf and out.loss[1].isfinite()


def test_the_worst_tokens_can_be_left_out(isa: str) -> None:
    case = make_case(8, tokens=90, ignored=0.2, bias=False)
    results = {}
    for backend in ("cpu", "reference"):
        hidden, weight = case.hidden.double(), case.weight.double()
        if backend == "cpu":
            hidden, weight = case.hidden, case.weight
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        out = cross_entropy(hidden, weight, case.labels, epsilon=0.1, drop_worst=0.3, backend=backend)
        results[backend] = [*out[:3], *torch.autograd.grad(out.loss, (hidden, weight))]
    for ours, exact in zip(results["cpu"], results["reference"], strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-4, atol=1e-4)


def test_the_backward_of_a_sum_can_run_twice() -> None:
    case = make_case(9)
    hidden = case.hidden.clone().requires_grad_()
    loss = cross_entropy(hidden, case.weight, case.labels, epsilon=0.1, backend="cpu").loss
    first = torch.autograd.grad(loss * 2, hidden, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss * 2, hidden)[0]
    torch.testing.assert_close(first, second)


def op_inputs(allowed: str) -> list[Any]:
    case = make_case(10, tokens=9, width=8, vocabulary=21, allowed=allowed)
    table = case.options.get("allowed")
    offsets, ids = (None, None) if table is None else (table.offsets, table.ids)
    return [
        *(case.hidden, case.weight, case.bias, case.labels, offsets, ids),
        *(case.options.get("allowed_range"), case.options.get("always_allowed", 0), 0.1),
    ]


@pytest.mark.parametrize("allowed", ["all", "rows", "range"])
def test_opcheck(allowed: str) -> None:
    inputs = op_inputs(allowed)
    ops = torch.ops.ofakern
    torch.library.opcheck(ops.cross_entropy_fwd.default, (*inputs, True))
    torch.library.opcheck(ops.cross_entropy_sum.default, (*inputs, False, True, True, True))
    loss, _, lse, _ = ops.cross_entropy_fwd(*inputs, False)
    torch.library.opcheck(ops.cross_entropy_bwd.default, (torch.ones_like(loss), lse, *inputs, True, True, False))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_full_graph(reduction: Any, dynamic: bool) -> None:
    case = make_case(11, tokens=20, width=8, vocabulary=50, allowed="rows")

    def gradients(function: Any) -> list[Tensor]:
        leaves = case.leaves(torch.float32)
        return list(torch.autograd.grad(function(*leaves), [leaf for leaf in leaves if leaf is not None]))

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = cross_entropy(hidden, weight, case.labels, bias, **case.options, reduction=reduction, backend="cpu")
        return out.loss.sum() * 3

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for ours, plain in zip(gradients(compiled), gradients(function), strict=True):
        torch.testing.assert_close(ours, plain)


def test_autocast_takes_its_dtype() -> None:
    case = make_case(12, bias=False)
    hidden = case.hidden.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(hidden, case.weight, case.labels, epsilon=0.1, backend="cpu").loss
    halved = cross_entropy(case.hidden.bfloat16(), case.weight.bfloat16(), case.labels, epsilon=0.1, backend="cpu")
    torch.testing.assert_close(loss, halved.loss)
    assert torch.autograd.grad(loss, hidden)[0].dtype == torch.float32


def test_a_second_derivative_and_vmap_are_refused() -> None:
    case = make_case(13)
    for reduction in ("sum", "none"):
        hidden = case.hidden.clone().requires_grad_()
        loss = cross_entropy(hidden, case.weight, case.labels, reduction=reduction, backend="cpu").loss.sum()
        grad = torch.autograd.grad(loss, hidden, create_graph=True)[0]
        with pytest.raises(OfakernRuntimeError, match="double backward"):
            grad.sum().backward()
    with pytest.raises(OfakernRuntimeError, match="vmap"):
        torch.vmap(lambda h: cross_entropy(h, case.weight, case.labels, backend="cpu").loss)(case.hidden[None])


H, W, Y = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
BAD: list[tuple[type[OfakernError], str, tuple[Any, ...], dict[str, Any]]] = [
    (OfakernTypeError, "hidden must be a tensor", (None, W, Y), {}),
    (OfakernTypeError, "hidden must be float32", (H.long(), W, Y), {}),
    (OfakernValueError, "hidden must have 2 dimensions", (H[0], W, Y), {}),
    (OfakernTypeError, "weight must have hidden's dtype", (H, W.bfloat16(), Y), {}),
    (OfakernValueError, "weight must be", (H, W[:, :3], Y), {}),
    (OfakernValueError, "V must be at least 1", (H, W[:0], Y), {}),
    (OfakernValueError, "bias must be", (H, W, Y), {"bias": torch.zeros(4)}),
    (OfakernTypeError, "labels must be an int64", (H, W, Y.int()), {}),
    (OfakernValueError, r"labels must be \[N=3\]", (H, W, Y[:2]), {}),
    (OfakernValueError, r"labels must be in \[0, V=5\) or -100, got 5 at 1", (H, W, torch.tensor([0, 5, 1])), {}),
    (OfakernValueError, "epsilon must be", (H, W, Y), {"epsilon": 1.0}),
    (OfakernValueError, "drop_worst must be in", (H, W, Y), {"drop_worst": 1.0}),
    (OfakernValueError, "drop_worst must be 0", (H, W, Y), {"drop_worst": 0.1, "reduction": "none"}),
    (OfakernValueError, "reduction must be", (H, W, Y), {"reduction": "mean"}),
    (OfakernValueError, "must be at most one", (H, W, Y), {"subset": Y[:1], "allowed_range": (0, 2)}),
    (OfakernValueError, "always_allowed must be", (H, W, Y), {"always_allowed": -1}),
    (OfakernTypeError, "allowed_range must be int32", (H, W, Y), {"allowed_range": torch.zeros(1, 2)}),
    (OfakernValueError, "labels must be in subset", (H, W, Y), {"subset": torch.tensor([1, 2])}),
    (OfakernValueError, "subset must hold every id once", (H, W, Y), {"subset": torch.tensor([0, 2, 2])}),
    (BackendError, "no CUDA kernel", (H, W, Y), {"backend": "cuda"}),
    (BackendError, "takes float32, bfloat16 and float16", (H.double(), W.double(), Y), {"backend": "cpu"}),
]


@pytest.mark.parametrize(("error", "message", "args", "kwargs"), BAD, ids=[case[1] for case in BAD])
def test_bad_arguments_are_named(
    error: type[OfakernError], message: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        cross_entropy(*args, **kwargs)


def test_explain_knows_the_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cross_entropy: runs on 'cpu'" in explain("cross_entropy", H, W, Y)
    assert "runs on 'reference'" in explain("cross_entropy", H.double(), W.double(), Y)
    capsys.readouterr()

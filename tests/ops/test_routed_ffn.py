"""Routed linear maps and the layer made of them, against the float64 oracle, on every instruction set."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rule import assert_kept
from short import examples
from torch import Tensor

from ofakern import explain
from ofakern.errors import BackendError, OfakernError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.ops import native
from ofakern.ops.routed_ffn import routed_ffn, routed_linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _kernels(cpu: Any) -> None:
    """Without the compiled module every test here fails."""


class Case(NamedTuple):
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    counts: list[int]
    source: Tensor | None
    target: Tensor | None
    dy: Tensor


def make_case(
    seed: int = 0,
    counts: tuple[int, ...] = (5, 0, 70),
    width: int = 40,
    out: int = 50,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    sorted_in: bool = False,
    sorted_out: bool = False,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    tokens = sum(counts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    def order(identity: bool) -> Tensor | None:
        return None if identity else torch.randperm(tokens, generator=g)

    weights = [normal(out, width) for _ in counts]
    biases = [normal(out) for _ in counts] if bias else []
    return Case(
        normal(tokens, width), weights, biases, list(counts), order(sorted_in), order(sorted_out), normal(tokens, out)
    )


def run(case: Case, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """y, dx, dweights, dbiases."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (case.x, *case.weights, *case.biases)]
    experts = len(case.weights)
    weights, biases = leaves[1 : 1 + experts], leaves[1 + experts :]
    y = routed_linear(leaves[0], weights, biases, case.counts, case.source, case.target, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, case.dy.to(dtype))]


def check(case: Case) -> None:
    dtype = case.x.dtype
    have, exact, peer = run(case, "cpu", dtype), run(case, "reference", torch.float64), run(case, "reference", dtype)
    sizes = run(Case(*(_absolute(part) for part in case)), "reference", torch.float64)  # type: ignore[arg-type]
    for n, parts in enumerate(zip(have, exact, peer, sizes, strict=True)):
        assert_kept(f"result {n}", *parts, dtype)


def _absolute(part: Any) -> Any:
    if isinstance(part, list):
        return [_absolute(x) for x in part]
    return part.abs() if isinstance(part, Tensor) and part.dtype.is_floating_point else part


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
            "counts": st.lists(st.sampled_from((0, 1, 31, 63, 64, 65, 130, 450)), min_size=1, max_size=4).map(tuple),
            "width": st.sampled_from((1, 7, 32, 64, 100, 300)),
            "out": st.sampled_from((1, 7, 32, 64, 100, 300)),
            "dtype": st.sampled_from(DTYPES),
            "bias": st.booleans(),
            "sorted_in": st.booleans(),
            "sorted_out": st.booleans(),
        }
    )
)
def test_the_kernel_keeps_the_rule(isa: str, case: dict[str, Any]) -> None:
    check(make_case(**case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_blocks_and_slices(dtype: torch.dtype) -> None:
    check(make_case(1, (70, 10), 600, 900, dtype))


def test_few_float32_tokens_and_long_rows_of_weight(isa: str) -> None:
    """Slices of rows that are not equal; outputs, columns and tokens that are no multiple of what a tile takes."""
    check(make_case(5, (5, 0, 70), 1552, 101))
    check(make_case(5, (2, 7, 128, 3), 144, 200))


@pytest.mark.parametrize(
    ("dtype", "counts", "gradient", "backend"),
    [
        (torch.float32, (20, 0, 40), True, "cpu"),
        (torch.float32, (20, 0, 97), True, "reference"),  # torch's products are faster for many tokens,
        (torch.float32, (1, 2, 3), True, "reference"),  # and their backward pass for very few
        (torch.float32, (1, 2, 3), False, "cpu"),
        (torch.float64, (20, 0, 40), True, "reference"),
        (torch.bfloat16, (20, 0, 97), True, "cpu"),
    ],
)
def test_what_auto_takes(dtype: torch.dtype, counts: tuple[int, ...], gradient: bool, backend: str) -> None:
    case = make_case(6, counts, 64, 48, dtype)
    with torch.set_grad_enabled(gradient):
        inputs = (case.x, case.weights, case.biases, case.counts)
        assert f"runs on '{backend}'" in explain("routed_ffn", *inputs)
        chosen, ours = (routed_linear(*inputs, backend=name) for name in ("auto", backend))
    assert torch.equal(chosen, ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_that_go_past_the_caches(dtype: torch.dtype) -> None:
    """From 16 MiB on, all experts' together."""
    check(make_case(4, (3, 33), 1024, 4160, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(isa: str, dtype: torch.dtype) -> None:
    case = make_case(2, (100, 3, 60), 300, 600, dtype)
    first = run(case, "cpu", dtype)
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(run(case, "cpu", dtype), first, strict=True))


def test_results_are_written_whole(isa: str) -> None:
    """Into memory full of NaN, experts without tokens included."""
    case = make_case(3)
    assert native.cpu is not None
    inputs = (case.x, case.weights, case.biases, list(case.counts), case.source, case.target, 1)
    y = torch.full_like(case.dy, torch.nan)
    size = native.cpu.routed_linear_forward_workspace(*inputs)
    native.cpu.routed_linear_forward(y, torch.full((size,), 255, dtype=torch.uint8), *inputs)
    grads = (
        torch.full_like(case.x, torch.nan),
        [torch.full_like(w, torch.nan) for w in case.weights],
        [torch.full_like(b, torch.nan) for b in case.biases],
    )
    size = native.cpu.routed_linear_backward_workspace(*grads, *inputs)
    native.cpu.routed_linear_backward(*grads, torch.full((size,), 255, dtype=torch.uint8), case.dy, *inputs)
    assert not any(x.isnan().any() for x in (y, grads[0], *grads[1], *grads[2]))
    assert not grads[1][1].any() and not grads[2][1].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_views_and_partial_gradients(backend: str) -> None:
    case = make_case(4)
    wide = torch.cat([case.x, torch.full_like(case.x, torch.nan)], 1)[:, : case.x.shape[1]]
    y = routed_linear(wide, case.weights, case.biases, case.counts, case.source, case.target, backend=backend)
    torch.testing.assert_close(y, run(case, backend, torch.float32)[0])
    bias = case.biases[0].clone().requires_grad_()
    y = routed_linear(case.x, case.weights, [bias, *case.biases[1:]], case.counts, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), bias)[0], torch.full_like(bias, case.counts[0]))


@pytest.mark.parametrize("norm", [False, True])
def test_the_layer_is_a_loop_over_its_tokens(norm: bool) -> None:
    g = torch.Generator().manual_seed(5)
    x, expert = torch.randn(30, 16, generator=g), torch.randint(3, (30,), generator=g, dtype=torch.int32)
    fc1, b1 = [list(torch.randn(3, *s, generator=g)) for s in ((24, 16), (24,))]
    fc2, b2 = [list(torch.randn(3, *s, generator=g)) for s in ((16, 24), (16,))]
    ln = (torch.randn(24, generator=g), torch.randn(24, generator=g)) if norm else ()
    rows = []
    for row, e in zip(x, expert.tolist(), strict=True):
        h = F.gelu(F.linear(row, fc1[e], b1[e]))
        rows.append(F.linear(F.layer_norm(h, (24,), *ln) if norm else h, fc2[e], b2[e]))
    for backend in ("cpu", "reference"):
        y = routed_ffn(x, expert, fc1, b1, fc2, b2, *ln, backend=backend)
        torch.testing.assert_close(y, torch.stack(rows), rtol=1e-4, atol=1e-4)


def test_opcheck() -> None:
    case = make_case(6, (3, 0, 4), 8, 9)
    inputs = (case.x, case.weights, case.biases, case.counts, case.source, case.target)
    torch.library.opcheck(torch.ops.ofakern.routed_linear_fwd.default, inputs)
    backward = (case.dy, case.x, case.weights, case.counts, case.source, None, True, True, True)
    torch.library.opcheck(torch.ops.ofakern.routed_linear_bwd.default, backward)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_full_graph(dynamic: bool) -> None:
    case = make_case(7, (3, 0, 4), 8, 9)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        weights = [weight, *case.weights[1:]]
        return routed_linear(x, weights, case.biases, case.counts, case.source, backend="cpu").square().sum()

    leaves = [case.x.clone().requires_grad_(), case.weights[0].clone().requires_grad_()]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    ours, plain = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, function))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_second_derivative_and_vmap() -> None:
    case = make_case(8)
    x = case.x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = routed_linear(x, case.weights, case.biases, case.counts, backend="cpu")
    assert y.dtype == torch.bfloat16 and torch.autograd.grad(y.float().sum(), x)[0].dtype == torch.float32
    y = routed_linear(x, case.weights, case.biases, case.counts, backend="cpu")
    grad = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
    with pytest.raises(OfakernRuntimeError, match="double backward"):
        grad.sum().backward()
    with pytest.raises(OfakernRuntimeError, match="vmap"):
        torch.vmap(lambda r: routed_linear(r, case.weights, [], case.counts, backend="cpu"))(case.x[None])


X, W, B = torch.zeros(3, 4), [torch.zeros(5, 4)] * 2, [torch.zeros(5)] * 2
BAD: list[tuple[type[OfakernError], str, tuple[Any, ...], dict[str, Any]]] = [
    (OfakernTypeError, "x must be a tensor", (None, W, B, [1, 2]), {}),
    (OfakernValueError, "x must have 2 dimensions", (X[0], W, B, [1, 2]), {}),
    (OfakernValueError, "weights must name at least one", (X, [], [], []), {}),
    (OfakernTypeError, r"weights\[1\] must have x's dtype", (X, [W[0], W[0].half()], B, [1, 2]), {}),
    (OfakernValueError, r"weights\[1\] must have shape", (X, [W[0], W[0][:4]], B, [1, 2]), {}),
    (OfakernValueError, "biases must be one per expert", (X, W, B[:1], [1, 2]), {}),
    (OfakernValueError, "counts must be 2 numbers", (X, W, B, [1, 1]), {}),
    (OfakernTypeError, "source must be an int64", (X, W, B, [1, 2]), {"source": torch.zeros(3)}),
    (OfakernValueError, "target must be a permutation", (X, W, B, [1, 2]), {"target": torch.tensor([0, 1, 1])}),
    (BackendError, "no CUDA kernel", (X, W, B, [1, 2]), {"backend": "cuda"}),
]


@pytest.mark.parametrize(("error", "message", "args", "kwargs"), BAD, ids=[case[1] for case in BAD])
def test_bad_arguments_are_named(
    error: type[OfakernError], message: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        routed_linear(*args, **{"backend": "cpu"} | kwargs)


def test_explain_and_a_wrong_expert(capsys: pytest.CaptureFixture[str]) -> None:
    half = [[t.bfloat16() for t in tensors] for tensors in (W, B)]
    assert "routed_ffn: runs on 'cpu'" in explain("routed_ffn", X.bfloat16(), *half, [1, 2])
    assert "runs on 'reference'" in explain("routed_ffn", X, W, B, [1, 2])  # torch's own products are faster
    capsys.readouterr()
    with pytest.raises(OfakernValueError, match=r"expert must be in \[0, E=2\)"):
        routed_ffn(X, torch.tensor([0, 1, 2]), W, B, W, B)

"""The fused LayerNorms among torch's machinery, their reference, what they refuse, and that the harness bites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_norm_cases import OPS, Case, check, make_case, plain, run, run_cpu
from torch import Tensor

import ofakern
from ofakern.errors import BackendError, OfakernError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.ops.layer_norm import add_layer_norm, embed_layer_norm, gelu_layer_norm, head_scale_layer_norm
from ofakern.ops.layer_norm import reference as oracle

pytestmark = pytest.mark.usefixtures("cpu")
ONE, ZERO = torch.ones(16), torch.zeros(16)


def small(op: str, **options: Any) -> Case:
    return make_case(op, 1, rows=5, width=12, **options)


def op_inputs(case: Case) -> tuple[Any, ...]:
    leaves, options = case.leaves, case.options
    affine = (leaves["weight"], leaves["bias"])
    if case.op == "add":
        p, seed = options.get("dropout_p", 0.0), options.get("dropout_seed")
        return leaves["x"], leaves["residual"], *affine, seed, 1e-5, p
    if case.op == "embed":
        tables = (options["tokens"], leaves["table"], options.get("types"), leaves.get("type_table"))
        return *tables, *affine, options["scale"], 1e-5
    scale = (leaves["head_scale"],) if case.op == "head_scale" else ()
    return leaves["x"], *scale, *affine, 1e-5


def backward_inputs(case: Case, outs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    dout, weight, stats = case.douts[0], case.leaves["weight"], outs[-1]
    if case.op == "add":
        options = (case.options.get("dropout_seed"), case.options.get("dropout_p", 0.0))
        return dout, case.douts[1], outs[1], stats, weight, *options
    if case.op == "embed":
        return dout, *op_inputs(case)[:4], stats, weight, case.options["scale"]
    scale = (case.leaves["head_scale"],) if case.op == "head_scale" else ()
    return dout, case.leaves["x"], *scale, stats, weight


@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
def test_opcheck(op: str, full: bool) -> None:
    case = small(op, dropout_p=0.25, types="many") if full else small(op, types="none")
    name = f"{op}_layer_norm"
    forward, backward = (getattr(torch.ops.ofakern, f"{name}_{way}").default for way in ("fwd", "bwd"))
    inputs = op_inputs(case)
    torch.library.opcheck(forward, inputs)
    torch.library.opcheck(backward, backward_inputs(case, forward(*inputs)))


@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_full_graph(op: str, dynamic: bool) -> None:
    case = small(op, dropout_p=0.25, types="many")
    torch._dynamo.reset()
    compiled = torch.compile(OPS[op][0], fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got, want = run(case, compiled, backend="cpu"), run_cpu(case)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("op", sorted(OPS))
def test_gradients_of_the_reference(op: str) -> None:
    case = small(op, dropout_p=0.25, types="many").to(torch.float64)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves.values()]

    def function(*values: Tensor) -> Any:
        return OPS[op][1](**dict(zip(case.leaves, values, strict=True)), **case.options)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("op", sorted(OPS))
def test_the_reference_is_what_torch_users_write(op: str) -> None:
    case = small(op, dropout_p=0.25, types="many").to(torch.float64)
    want, got = run(case, plain(op)), run(case, OPS[op][0])  # float64 takes the reference
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("op", sorted(OPS))
def test_the_rule_bites(op: str) -> None:
    """Results that are wrong by a thousandth, or gradients of half the rows, must not pass."""
    case = make_case(op, 2, rows=40, width=24)
    check(case)
    for name in run_cpu(case):

        def wrong(case: Case, name: str = name) -> dict[str, Tensor]:
            found = run_cpu(case)
            return found | {name: found[name] * 1.001}

        with pytest.raises(AssertionError, match=name):
            check(case, wrong)


@pytest.mark.parametrize("op", sorted(OPS))
def test_second_derivatives_and_vmap_are_refused(op: str) -> None:
    case = small(op)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.leaves.items()}
    out = OPS[op][0](**leaves, **case.options, backend="cpu")
    out = out[0] if isinstance(out, tuple) else out
    (grad,) = torch.autograd.grad(out.square().sum(), leaves["weight"], create_graph=True)
    with pytest.raises(OfakernRuntimeError, match="got a double backward\nTry: backend='reference'"):
        grad.sum().backward()
    for bias in (case.leaves["bias"], leaves["bias"]):
        with pytest.raises(OfakernRuntimeError, match="must not be called under vmap"):
            rest = {**case.leaves, "bias": bias}
            torch.vmap(lambda w, rest=rest: OPS[op][0](**{**rest, "weight": w}, **case.options, backend="cpu"))(
                torch.ones(3, 12)
            )


def test_no_autograd_node_without_gradients() -> None:
    case = small("add")
    assert add_layer_norm(**case.leaves, backend="cpu")[0].grad_fn is None
    with torch.no_grad():
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.leaves.items()}
        assert add_layer_norm(**leaves, backend="cpu")[1].grad_fn is None


def test_leading_dimensions_are_rows() -> None:
    x = torch.randn(2, 3, 4, 16)
    out, total = add_layer_norm(x, x, ONE, ZERO, backend="cpu")
    flat, _ = add_layer_norm(x.view(24, 16), x.view(24, 16), ONE, ZERO, backend="cpu")
    assert out.shape == total.shape == x.shape
    assert torch.equal(out.view(24, 16), flat)
    assert gelu_layer_norm(x[0, 0, 0], ONE, ZERO, backend="cpu").shape == (16,)
    tokens = torch.tensor([[0, 1], [1, 0]])
    assert embed_layer_norm(tokens, torch.randn(2, 16), ONE, ZERO, backend="cpu").shape == (2, 2, 16)


def test_empty_inputs_have_zero_parameter_gradients() -> None:
    for op in OPS:
        found = run_cpu(make_case(op, 0, rows=0, width=12))
        assert not found["dweight"].any()
        assert found["out0"].shape == (0, 12)


def test_negative_bit_is_resolved() -> None:
    case = small("add")
    negative = {name: torch._neg_view(-leaf) for name, leaf in case.leaves.items()}
    assert negative["x"].is_neg()
    for have, want in zip(add_layer_norm(**negative, backend="cpu"), add_layer_norm(**case.leaves), strict=True):
        assert torch.equal(have, want)


def test_autocast_takes_the_dtype_of_a_sum() -> None:
    x, residual = torch.randn(4, 16).bfloat16(), torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, total = add_layer_norm(x, residual, ONE, ZERO, backend="cpu")
        want = torch.nn.functional.layer_norm(residual + x, (16,), ONE, ZERO)
        assert gelu_layer_norm(x, ONE, ZERO, backend="cpu").dtype == torch.bfloat16
    assert out.dtype == total.dtype == want.dtype == torch.float32
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: add_layer_norm(x, x[:1], ONE, ZERO), OfakernValueError, r"residual must have x's shape \[3, 16\]"),
        (lambda x: add_layer_norm(x, x.half(), ONE, ZERO), OfakernTypeError, "residual must have x's dtype"),
        (lambda x: add_layer_norm(x, x, ONE[:3], ZERO), OfakernValueError, r"weight must have shape \[D = 16\]"),
        (lambda x: add_layer_norm(x, x, ONE, ZERO.int()), OfakernTypeError, "bias must be float32, bfloat16"),
        (lambda x: add_layer_norm(x, x, ONE, ZERO, eps=float("nan")), OfakernValueError, "eps must be at least 0"),
        (lambda x: add_layer_norm(x, x, ONE, ZERO, dropout_p=1.0), OfakernValueError, r"dropout_p must be in \[0, 1\)"),
        (
            lambda x: add_layer_norm(x, x, ONE, ZERO, dropout_p=0.1, dropout_seed=torch.ones(2)),
            OfakernTypeError,
            "dropout_seed must be an int64 tensor",
        ),
        (lambda x: add_layer_norm(x, x.tolist(), ONE, ZERO), OfakernTypeError, "residual must be a tensor, got list"),
        (lambda x: gelu_layer_norm(x.int(), ONE, ZERO), OfakernTypeError, "x must be float32"),
        (lambda x: gelu_layer_norm(x[0, 0], ONE, ZERO), OfakernValueError, r"x must have shape \[..., D\]"),
        (lambda x: gelu_layer_norm(x.double(), ONE, ZERO, backend="cpu"), BackendError, "got torch.float64"),
        (lambda x: gelu_layer_norm(x, ONE, ZERO, backend="gpu"), OfakernValueError, "backend must be one of"),
        (lambda x: head_scale_layer_norm(x, ONE, ONE, ZERO), OfakernValueError, r"x must have shape \[N, H, K\]"),
        (
            lambda x: head_scale_layer_norm(x.view(3, 4, 4), ONE, ONE, ZERO),
            OfakernValueError,
            r"head_scale must have shape \[H = 4\]",
        ),
        (
            lambda x: embed_layer_norm(torch.tensor([3]), x, ONE, ZERO),
            OfakernValueError,
            r"tokens must be in \[0, V = 3\), got 3",
        ),
        (
            lambda x: embed_layer_norm(torch.tensor([0]), x, ONE, ZERO, x, torch.tensor([-1])),
            OfakernValueError,
            r"types must be in \[0, T = 3\), got -1",
        ),
        (lambda x: embed_layer_norm(torch.tensor([0]), x, ONE, ZERO, x), OfakernValueError, "must have one row where"),
        (
            lambda x: embed_layer_norm(torch.tensor([0]), x, ONE, ZERO, None, torch.tensor([0])),
            OfakernValueError,
            "types must be None where type_table is None",
        ),
        (lambda x: embed_layer_norm(x, x, ONE, ZERO), OfakernTypeError, "tokens must be int64"),
    ],
)
def test_bad_arguments_are_told(call: Any, error: type[OfakernError], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(3, 16))


def test_the_binding_checks_again(cpu: Any) -> None:
    """Sizes that would make a kernel read or write beyond an array are refused below Python, too."""
    x, stats, scratch = torch.randn(3, 16), torch.empty(3, 2), torch.empty(1 << 16, dtype=torch.uint8)
    with pytest.raises(OfakernValueError, match=r"gelu_layer_norm: weight must have shape \[D\] = \[16\]"):
        cpu.gelu_layer_norm_forward(x, stats, scratch, x, ONE[:8], ZERO, 1e-5, 1)
    with pytest.raises(OfakernValueError, match="workspace must hold at least"):
        cpu.gelu_layer_norm_forward(x, stats, scratch[:64], x, ONE, ZERO, 1e-5, 1)
    with pytest.raises(OfakernTypeError, match="out must have x's dtype"):
        cpu.gelu_layer_norm_forward(x.half(), stats, scratch, x, ONE, ZERO, 1e-5, 1)
    with pytest.raises(OfakernValueError, match="x must be contiguous"):
        cpu.gelu_layer_norm_forward(x, stats, scratch, torch.randn(16, 3).t(), ONE, ZERO, 1e-5, 1)
    with pytest.raises(OfakernValueError, match="dx must be None without dropout"):
        cpu.add_layer_norm_backward(x, x, ONE, ONE, scratch, x, None, x, stats, ONE, None, 0.0, 1)


def test_explain_knows_the_ops(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(3, 16)
    assert "runs on 'cpu'" in ofakern.explain("add_layer_norm", x, x, ONE, ZERO)
    assert "runs on 'reference'" in ofakern.explain("gelu_layer_norm", x.double(), ONE, ZERO)
    assert "runs on 'cpu'" in ofakern.explain("embed_layer_norm", torch.tensor([0]), x, ONE, ZERO)


def test_masks_differ_by_row_and_column() -> None:
    keep = oracle.dropout_keep(torch.tensor([1, 2]), 0.5, 64, 128)
    assert 0.45 < float(keep.float().mean()) < 0.55
    assert len({tuple(row.tolist()) for row in keep}) == 64
    assert len({tuple(column.tolist()) for column in keep.t()}) == 128

"""The registered ops among torch's machinery: opcheck, compile, export, transforms, odd views."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import Case, assert_same_bits, make_case, run_backend
from torch import Tensor

from ofakern.errors import OfakernRuntimeError
from ofakern.ops.attention import AttentionLayout, attention, intervals

pytestmark = pytest.mark.usefixtures("cpu")
CPU = run_backend("cpu")


def op_inputs(case: Case) -> list[Any]:
    """The case as positional arguments of `ofakern::attention_fwd`."""
    layout = case.layout
    terms: list[Tensor | None] = []
    for table, term in zip(case.tables, layout.terms, strict=True):
        terms += [table, term.q_coord, term.k_coord, term.same]
    terms += [None] * (8 - len(terms))
    scale, p = case.q.shape[2] ** -0.5, case.options.get("dropout_p", 0.0)
    return [
        *(case.q, case.k, case.v, case.q_pos, case.k_pos, *terms, case.head_scale, case.options.get("dropout_seed")),
        *(layout.visible, layout.q_offsets, layout.k_offsets, layout.key_seen, layout.k_range),
        *((None, None) if layout.shared is None else (layout.shared.sets, layout.shared.members)),
        *(scale, p),
    ]


@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
def test_opcheck(full: bool) -> None:
    options = {"terms": 2, "pos_width": 8, "dropout_p": 0.25} if full else {"terms": 0, "head_scale": False}
    case = make_case(1, (9, 5), width=8, unread_nan=False, **options)
    inputs = op_inputs(case)
    torch.library.opcheck(torch.ops.ofakern.attention_fwd.default, inputs)
    out, lse = torch.ops.ofakern.attention_fwd(*inputs)
    torch.library.opcheck(torch.ops.ofakern.attention_bwd.default, (case.dout, case.dlse, out, lse, *inputs))
    torch.library.opcheck(torch.ops.ofakern.attention_bwd.default, (case.dout, None, out, lse, *inputs))


def loss(case: Case) -> Tensor:
    out, lse = attention(
        case.q, case.k, case.v, case.layout, case.q_pos, case.k_pos, case.tables, case.head_scale,
        return_lse=True, backend="cpu", **case.options,
    )  # fmt: skip
    return (out * case.dout).sum() + (0.0 if case.dlse is None else (lse * case.dlse).sum())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_full_graph(dynamic: bool) -> None:
    case = make_case(2, (9, 5), width=8, pos_width=8, terms=2, dropout_p=0.2, unread_nan=False)

    def gradients(function: Any) -> list[Tensor]:
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.leaves().items()}
        return list(torch.autograd.grad(function(leaves, case.layout), list(leaves.values())))

    def function(leaves: dict[str, Tensor], layout: AttentionLayout) -> Tensor:
        return loss(replace_leaves(case, leaves, layout))

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for a, b in zip(gradients(compiled), gradients(function), strict=True):
        torch.testing.assert_close(a, b)


def replace_leaves(case: Case, leaves: dict[str, Tensor], layout: AttentionLayout) -> Case:
    return case.with_leaves(leaves, layout=layout)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_inference(compiler: str) -> None:
    case = make_case(3, (9, 5), width=8, terms=1, unread_nan=False)
    torch._dynamo.reset()

    def function(q: Tensor, layout: AttentionLayout) -> Tensor:
        return attention(q * 2, case.k, case.v, layout, tables=case.tables, backend="cpu") + 1

    with torch.no_grad():
        got = torch.compile(function, fullgraph=True, backend=compiler)(case.q, case.layout)
        torch.testing.assert_close(got, function(case.q, case.layout))


def test_export_for_inference() -> None:
    case = make_case(4, (9, 5), width=8, terms=1, unread_nan=False)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(case.tables[0])

        def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
            return attention(q, k, v, layout, tables=[self.table], backend="cpu")

    inputs = (case.q, case.k, case.v, case.layout)
    with torch.no_grad():
        program = torch.export.export(Layer(), inputs)
        names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert "ofakern.attention_fwd.default" in names
        torch.testing.assert_close(program.module()(*inputs), Layer()(*inputs))


def test_no_autograd_node_without_gradients() -> None:
    case = make_case(5, (9,), width=8)
    assert attention(case.q, case.k, case.v, case.layout, tables=case.tables, backend="cpu").grad_fn is None
    q = case.q.clone().requires_grad_()
    with torch.no_grad():
        assert attention(q, case.k, case.v, case.layout, tables=case.tables, backend="cpu").grad_fn is None


def test_double_backward_is_refused() -> None:
    case = make_case(6, (9,), width=8, unread_nan=False, terms=0)
    q = case.q.clone().requires_grad_()
    out = attention(q, case.k, case.v, case.layout, backend="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(OfakernRuntimeError, match="got a double backward\nTry: backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_vmap_is_refused(requires_grad: bool) -> None:
    layout = AttentionLayout.build(intervals.full([4]), [4], [4])
    k = torch.randn(4, 2, 8, requires_grad=requires_grad)
    with pytest.raises(OfakernRuntimeError, match="must not be called under vmap"):
        torch.vmap(lambda q: attention(q, k, k, layout, backend="cpu"))(torch.randn(3, 4, 2, 8))


def test_functional_grad_works() -> None:
    case = make_case(7, (9,), width=8, unread_nan=False, terms=0)

    def total(q: Tensor) -> Tensor:
        return attention(q, case.k, case.v, case.layout, backend="cpu").square().sum()

    q = case.q.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(total)(case.q), torch.autograd.grad(total(q), q)[0])


def test_negative_bit_is_resolved() -> None:
    """A view that only carries a minus sign must not reach the kernel as its unsigned bits."""
    case = make_case(8, (9, 30), width=16, pos_width=16, unread_nan=False)
    negative = {name: torch._neg_view(-leaf) for name, leaf in case.leaves().items()}
    assert negative["q"].is_neg()
    got = CPU(replace(case.with_leaves(negative), dout=torch._neg_view(-case.dout), dlse=torch._neg_view(-case.dlse)))
    assert_same_bits(got, CPU(case))


def test_strides_do_not_change_bits() -> None:
    """Fused projections, transposed tensors, gradients that a sum expands: the same numbers."""
    want = CPU(make_case(9, (33, 65), width=16, pos_width=16))
    for strides in ("fused", "transposed"):
        assert_same_bits(CPU(make_case(9, (33, 65), width=16, pos_width=16, strides=strides)), want)
    case = make_case(9, (33, 65), width=16, unread_nan=False)
    ones = torch.ones(())
    expanded = CPU(replace(case, dout=ones.expand(case.dout.shape), dlse=ones.expand(case.dlse.shape)))
    assert_same_bits(expanded, CPU(replace(case, dout=torch.ones_like(case.dout), dlse=torch.ones_like(case.dlse))))


def test_only_lse_has_a_gradient() -> None:
    case = make_case(10, (20,), width=8, terms=0, head_scale=False)
    q = case.q.clone().requires_grad_()
    _, lse = attention(q, case.k, case.v, case.layout, return_lse=True, backend="cpu")
    _, want = attention(q, case.k, case.v, case.layout, return_lse=True, backend="reference")
    (a,), (b,) = torch.autograd.grad(lse.sum(), q), torch.autograd.grad(want.sum(), q)
    torch.testing.assert_close(a, b)


def test_expanded_and_shared_inputs() -> None:
    """One key head expanded to all heads by strides, and one tensor as q, k and v."""
    x = torch.randn(20, 1, 16)
    layout = AttentionLayout.build(intervals.causal([20]), [20], [20])
    q = torch.randn(20, 4, 16)
    wide = attention(q, x.expand(20, 4, 16), x.expand(20, 4, 16), layout, backend="cpu")
    torch.testing.assert_close(wide, attention(q, x, x, layout, backend="cpu"))
    torch.testing.assert_close(
        attention(q, q, q, layout, backend="cpu"), attention(q, q, q, layout, backend="reference")
    )

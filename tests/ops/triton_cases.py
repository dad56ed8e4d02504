"""The Triton kernels against the float64 oracle: on a GPU, or interpreted (TRITON_INTERPRET=1) in float32 and float16.

test_attention_triton.py runs this file in a process of its own: triton reads TRITON_INTERPRET on import of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from attention_cases import CASES, EVERYTHING
from harness import Case, assert_same_bits, check, make_case, run_backend
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton_setup import DEVICE, DTYPES, INTERPRETED, to_device

from ofakern.errors import BackendError
from ofakern.ops import triton_launch
from ofakern.ops.attention import attention, kernel_triton
from ofakern.ops.attention.triton_kernels import backward, tables


def run(case: Case) -> dict[str, Tensor]:
    """The case through backend="triton", on the GPU when not interpreted; results on the CPU."""
    leaves = {name: tensor.to(DEVICE) for name, tensor in case.leaves().items()}
    moved = case.with_leaves(
        leaves,
        layout=to_device(case.layout),
        dout=to_device(case.dout),
        dlse=to_device(case.dlse),
        options=to_device(case.options),
    )
    return {name: result.cpu() for name, result in run_backend("triton")(moved).items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_keep_the_rule(name: str, dtype: torch.dtype) -> None:
    check(make_case(len(name), **CASES[name], dtype=dtype), run)


@pytest.mark.skipif(INTERPRETED, reason="minutes when interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("mask", ["full", "causal", "random"])
def test_many_blocks(mask: str, width: int, dtype: torch.dtype) -> None:
    pos_width = width if width <= 64 else None
    check(make_case(1, (300, 63, 129), mask=mask, width=width, pos_width=pos_width, terms=2, dtype=dtype), run)


def test_large_scores_do_not_overflow() -> None:
    """Scores near +-1e4 (the softmax is a hard maximum), and table entries of -1e30 as a user's own mask."""
    case = make_case(11, (35, 20), heads=1, width=32, mask="causal")
    table = case.tables[0].clone()
    table[:, ::3] = -1e30
    check(replace(case, q=case.q * 300, k=case.k * 10, tables=(table,)), run)


def test_head_scale_of_zero_has_its_gradient() -> None:
    check(replace(make_case(16, (20,), heads=2), head_scale=torch.tensor([0.0, 1.5])), run)


def test_coordinates_may_be_far_apart() -> None:
    """Sampled patches in any order: a tile's rows span more than one step of the table kernel."""
    case = make_case(17, (40,), heads=1, terms=1)
    term = case.layout.terms[0]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).int() * 11
    whole = torch.tensor([[0, 40]] * 40, dtype=torch.int32)
    term = replace(term, q_coord=order + 429, k_coord=order, same=whole, rows=859)
    table = torch.randn(1, 859, generator=torch.Generator().manual_seed(1))
    check(replace(case, layout=replace(case.layout, terms=(term,)), tables=(table,)), run)


@pytest.mark.parametrize("mask", ["causal", "random"])
def test_plans_hold_every_token_and_hull(mask: str) -> None:
    """Blocks of one sample each, hulls of what their rows see, and for keys the run of blocks that see them."""
    case = make_case(22, (19, 0, 40), terms=2, mask=mask, empty_rows=True)
    layout = case.layout
    moved = layout.to(DEVICE)
    given = {"q": case.q.to(DEVICE), "k": case.k.to(DEVICE), "table0": 1, "table1": 1, **vars(moved)}
    given |= {f"same{t}": moved.terms[t].same for t in range(2)}
    queries, planned = kernel_triton._plan_queries(given, 16)
    keys, keys_planned = kernel_triton._plan_keys(given, queries, 32)
    planned.run()
    keys_planned.run()

    tokens = []
    for sample, begin, end, *hulls in queries.tolist():
        tokens += range(begin, end)
        if begin < end:
            assert layout.q_offsets[sample] <= begin and end <= layout.q_offsets[sample + 1]
        seen = layout.visible[begin:end]
        for n, same in enumerate([None, layout.terms[0].same, layout.terms[1].same]):
            lo, hi = seen.unbind(1)
            if same is not None:
                lo, hi = lo.maximum(same[begin:end, 0]), hi.minimum(same[begin:end, 1])
            busy = hi > lo
            hull = [int(lo[busy].min()), int(hi[busy].max())] if busy.any() else [0, 0]
            assert hulls[2 * n : 2 * n + 2] == hull
    assert tokens == list(range(layout.queries))

    tokens = []
    for sample, begin, end, first, last in keys.tolist():
        tokens += range(begin, end)
        if begin < end:
            assert layout.k_offsets[sample] <= begin and end <= layout.k_offsets[sample + 1]
        meets = [b for b, (_, _, _, lo, hi, *_) in enumerate(queries.tolist()) if lo < end and hi > begin and lo < hi]
        assert not meets or begin == end or (first, last) == (meets[0], meets[-1] + 1)
        assert meets or first >= last
    assert tokens == list(range(layout.keys))


def test_same_bits_every_time() -> None:
    case = make_case(18, **EVERYTHING)
    assert_same_bits(run(case), run(case))


def test_a_launch_that_does_not_fit_names_itself() -> None:
    class Full:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(**arguments: Any) -> None:
                raise OutOfResources(300_000, 232_448, "shared memory")

            return launch

    with pytest.raises(BackendError, match="attention: backend 'triton' cannot run this call: .*shared memory"):
        triton_launch.run("attention", torch.empty(0), [triton_launch.Launch(Full(), (1,), {}, {}, {})])


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter refuses bfloat16")
def test_the_interpreter_refuses_bfloat16() -> None:
    case = make_case(19, (3,), terms=0, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        attention(case.q, case.k, case.v, case.layout, backend="triton")


def test_the_registered_op() -> None:
    case = make_case(20, (5,), heads=1, terms=0, head_scale=False)
    layout = case.layout.to(DEVICE)
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (case.q, case.k, case.v)]
    offsets = (layout.visible, layout.q_offsets, layout.k_offsets, layout.key_seen, layout.k_range)
    inputs = (*leaves, *[None] * 12, *offsets, None, None, 0.25, 0.0)
    torch.library.opcheck(torch.ops.ofakern.attention_fwd_triton.default, inputs)
    out, lse = torch.ops.ofakern.attention_fwd_triton(*inputs)
    grads = (torch.ones_like(out), torch.ones_like(lse))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.ofakern.attention_bwd_triton.default, (*grads, out, lse, *inputs), test_utils=checks
    )


@triton.jit
def _no_term(score, table, q_coord, k_coord, same_lo, same_hi, key, visible, meets):  # type: ignore[no-untyped-def]
    return score


@triton.jit
def _rows_off_by_one(parts, dscore, active, q_coord, k_coord, rows, SPAN: tl.constexpr, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
    _add_tile(parts, dscore, active, q_coord + 1, k_coord, rows, SPAN, RUN)


_add_tile = tables._add_tile
WRONG: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "scale": lambda patch: patch.setattr(kernel_triton, "_LOG2E", 1.5),
    "no table in backward": lambda patch: patch.setattr(backward, "add_term", _no_term),
    "table gradient one row off": lambda patch: patch.setattr(tables, "_add_tile", _rows_off_by_one),
    "blocks of another size": lambda patch: patch.setattr(kernel_triton, "_plan_queries", _half_blocks),
}
_plan_queries = kernel_triton._plan_queries


def _half_blocks(given: Any, size: int) -> Any:
    return _plan_queries(given, 2 * size)


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels keep what they were compiled from")
@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_break_the_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(21, (40,), heads=1, mask="causal")
    WRONG[name](monkeypatch)
    with pytest.raises(AssertionError, match="error .* above"):
        check(case, run)

"""Attention in CUDA C++ against the float64 oracle: the harness of every backend, on an emulated GPU and a real one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import CASES, EVERYTHING
from harness import Case, assert_same_bits, check, make_case, run_backend
from torch import Tensor
from torch.utils import _pytree as pytree

import ofakern
from ofakern.errors import BackendError
from ofakern.ops import native
from ofakern.ops.attention import attention

DTYPES = (torch.bfloat16, torch.float16)
# Widths above 128 are refused; the widest instance serves this one.
CUDA_CASES = CASES | {"wide": {"q_lengths": (18,), "heads": 1, "width": 128, "value_width": 128, "pos_width": 72}}


def run_on(device: torch.device, case: Case) -> dict[str, Tensor]:
    """The case through backend="cuda" on the device; results on the CPU."""

    def to_device(tree: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), tree)

    leaves = {name: tensor.to(device) for name, tensor in case.leaves().items()}
    moved = case.with_leaves(
        leaves,
        layout=to_device(case.layout),
        dout=case.dout.to(device),
        dlse=to_device(case.dlse),
        options=to_device(case.options),
    )
    return {name: result.cpu() for name, result in run_backend("cuda")(moved).items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CUDA_CASES)
def test_kernels_keep_the_rule(cuda_device: torch.device, name: str, dtype: torch.dtype) -> None:
    check(make_case(len(name), **CUDA_CASES[name], dtype=dtype), lambda case: run_on(cuda_device, case))


@pytest.mark.parametrize(
    ("mask", "lengths", "widths", "terms"),
    [
        ("full", (150,), (16, 16, 8), 2),
        ("causal", (131, 0, 63), (32, 16, None), 1),
        ("window", (64, 128), (8, 64, 64), 1),
        ("random", (65, 70), (16, 72, 24), 2),
    ],
)
def test_many_blocks(
    cuda_device: torch.device,
    mask: str,
    lengths: tuple[int, ...],
    widths: tuple[int, int, int | None],
    terms: int,
) -> None:
    width, value, pos = widths
    case = make_case(
        1, lengths, heads=2, key_heads=1, mask=mask, width=width, value_width=value, pos_width=pos, terms=terms,
        dropout_p=0.2, dtype=torch.bfloat16,
    )  # fmt: skip
    check(case, lambda moved: run_on(cuda_device, moved))


def test_large_scores_do_not_overflow(cuda_device: torch.device) -> None:
    """Scores near +-1e4 (the softmax is a hard maximum), and table entries of -1e30 as a user's own mask."""
    case = make_case(11, (35, 20), heads=1, width=32, mask="causal", dtype=torch.bfloat16)
    table = case.tables[0].clone()
    table[:, ::3] = -1e30
    case = replace(case, q=case.q * 300, k=case.k * 10, tables=(table,))
    check(case, lambda moved: run_on(cuda_device, moved))


def test_head_scale_of_zero_has_its_gradient(cuda_device: torch.device) -> None:
    case = replace(make_case(16, (20,), heads=2, dtype=torch.float16), head_scale=torch.tensor([0.0, 1.5]))
    check(case, lambda moved: run_on(cuda_device, moved))


def far_apart(step: int, repeats: int) -> Case:
    """Coordinates in any order that differ by multiples of `step`; each stands there `repeats` times."""
    case = make_case(17, (80,), heads=1, terms=1, dtype=torch.float16)
    term = case.layout.terms[0]
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0)).int() // repeats * step
    most = 80 // repeats * step
    whole = torch.tensor([[0, 80]] * 80, dtype=torch.int32)
    term = replace(term, q_coord=order + most, k_coord=order, same=whole, rows=2 * most + 1)
    table = torch.randn(1, 2 * most + 1, generator=torch.Generator().manual_seed(1))
    return replace(case, layout=replace(case.layout, terms=(term,)), tables=(table,))


@pytest.mark.parametrize(("step", "repeats"), [(11, 1), (1, 7), (1, 80), (3, 2)])
def test_coordinates_in_any_order(cuda_device: torch.device, step: int, repeats: int) -> None:
    """Sampled patches far apart (several windows of the table's sums), and frames, whose tokens share a coordinate."""
    check(far_apart(step, repeats), lambda moved: run_on(cuda_device, moved))


@pytest.mark.parametrize("name", ["everything", "frames"])
def test_same_bits_every_time(cuda_device: torch.device, name: str) -> None:
    """On the emulator under other orders of the threads, too."""
    case = make_case(18, **EVERYTHING, dtype=torch.bfloat16) if name == "everything" else far_apart(1, 7)
    first = run_on(cuda_device, case)
    for seed in (2, 3):
        if cuda_device.type == "cpu":
            native.cuda_kernels.set_seed(seed)
        assert_same_bits(first, run_on(cuda_device, case))


def test_unaligned_views_are_copied(cuda_device: torch.device) -> None:
    case = make_case(3, (33,), heads=1, terms=0, dtype=torch.bfloat16)
    want = run_on(cuda_device, case)
    odd = {
        name: torch.cat([leaf.new_zeros(1), leaf.flatten()])[1:].view_as(leaf) for name, leaf in case.leaves().items()
    }
    assert_same_bits(want, run_on(cuda_device, case.with_leaves(odd)))


def test_what_it_refuses_names_itself(cuda_device: torch.device) -> None:
    case = make_case(4, (5,), heads=1, width=136, terms=0, head_scale=False, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="takes widths up to 128, got 136"):
        attention(*(x.to(cuda_device) for x in (case.q, case.k, case.v)), case.layout.to(cuda_device), backend="cuda")
    case = make_case(4, (5,), heads=1, terms=0, head_scale=False)
    with pytest.raises(BackendError, match="takes bfloat16 and float16"):
        attention(*(x.to(cuda_device) for x in (case.q, case.k, case.v)), case.layout.to(cuda_device), backend="cuda")


def test_compile_and_autocast(cuda_device: torch.device) -> None:
    case = make_case(6, (9,), heads=1, terms=1, dtype=torch.float32)
    layout = case.layout.to(cuda_device)
    q, k, v, table = (x.to(cuda_device) for x in (case.q, case.k, case.v, case.tables[0]))

    def function(q: Tensor) -> Tensor:
        with torch.autocast(cuda_device.type, torch.bfloat16):
            return attention(q, k, v, layout, tables=[table], backend="cuda")

    leaf, plain = q.clone().requires_grad_(), q.clone().requires_grad_()
    have, want = torch.compile(function, fullgraph=True, backend="aot_eager")(leaf), function(plain)
    assert have.dtype == torch.bfloat16 and torch.equal(have, want)
    have.sum().backward()
    want.sum().backward()
    assert leaf.grad is not None and plain.grad is not None and torch.equal(leaf.grad, plain.grad)


def test_a_failed_launch_returns_nothing(cuda_device: torch.device) -> None:
    if cuda_device.type != "cpu":
        pytest.skip("failures are made by the emulator")
    case = make_case(5, (5,), heads=1, terms=0, head_scale=False, dtype=torch.bfloat16)
    native.cuda_kernels.fail_next_launch(700)
    with pytest.raises(
        ofakern.errors.OfakernRuntimeError, match="CUDA kernel attention_plan: not launched: an earlier"
    ):
        attention(case.q, case.k, case.v, case.layout, backend="cuda")


def test_the_registered_op(cuda_device: torch.device) -> None:
    case = make_case(20, (5,), heads=1, terms=0, head_scale=False, dtype=torch.bfloat16)
    layout = case.layout.to(cuda_device)
    leaves = [tensor.to(cuda_device).requires_grad_() for tensor in (case.q, case.k, case.v)]
    offsets = (layout.visible, layout.q_offsets, layout.k_offsets, layout.key_seen, layout.k_range)
    inputs = (*leaves, *[None] * 12, *offsets, None, None, 0.25, 0.0)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ofakern.attention_fwd.default, inputs, test_utils=checks)
    out, lse = torch.ops.ofakern.attention_fwd(*(x.detach() if isinstance(x, Tensor) else x for x in inputs))
    grads = (torch.ones_like(out), torch.ones_like(lse))
    torch.library.opcheck(torch.ops.ofakern.attention_bwd.default, (*grads, out, lse, *inputs), test_utils=checks)

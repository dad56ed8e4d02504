"""The CPU kernels against the float64 oracle, for every instruction set that this machine has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import DTYPES, Case, assert_same_bits, check, make_case, oracle, run_backend
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from short import examples

from ofakern.ops.attention import AttentionLayout, attention, intervals

CPU = run_backend("cpu")
LENGTHS = (0, 1, 2, 7, 31, 63, 64, 65, 100, 129)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of make_case that a kernel must take."""
    lengths = st.lists(st.sampled_from(LENGTHS), max_size=3).map(tuple)
    q_lengths = draw(lengths)
    widths = st.sampled_from((8, 16, 24, 32, 64, 80, 96, 128, 256))
    key_heads = draw(st.sampled_from((1, 2)))
    mask = draw(st.sampled_from(("full", "causal", "window", "prefix", "random")))
    cross = draw(st.booleans())
    return {
        "seed": draw(st.integers(0, 2**30)),
        "q_lengths": q_lengths,
        "k_lengths": tuple(draw(st.sampled_from(LENGTHS)) for _ in q_lengths) if cross else None,
        "heads": key_heads * draw(st.sampled_from((1, 2, 3))),
        "key_heads": key_heads,
        "width": draw(widths),
        "value_width": draw(widths),
        "pos_width": draw(st.one_of(st.none(), widths)),
        "terms": draw(st.integers(0, 2)),
        "mask": mask,
        "head_scale": draw(st.booleans()),
        "lse_gradient": draw(st.booleans()),
        "dropout_p": draw(st.sampled_from((0.0, 0.0, 0.3))),
        "empty_rows": draw(st.booleans()),
        "strides": draw(st.sampled_from(("contiguous", "fused", "transposed"))),
        "dtype": draw(st.sampled_from(DTYPES)),
    }


@settings(
    max_examples=examples(100),
    deadline=None,
    derandomize=True,  # the same cases on every machine; nothing is stored
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(calls())
@example({"q_lengths": (64, 65), "mask": "causal", "terms": 2, "pos_width": 64, "width": 64, "dtype": torch.bfloat16})
@example({"q_lengths": (65, 0, 63), "mask": "random", "terms": 1, "width": 32, "dtype": torch.float16})
def test_kernels_keep_the_rule(isa: str, arguments: dict[str, Any]) -> None:
    check(make_case(**arguments), CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("pos", [False, True], ids=["no_pos", "pos"])
def test_vectorised_widths(cpu: Any, width: int, pos: bool, dtype: torch.dtype) -> None:
    """Long enough for several blocks of queries and of keys."""
    case = make_case(width, (193,), heads=1, width=width, pos_width=width if pos else None, terms=1, dtype=dtype)
    check(case, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_are_independent(isa: str, dtype: torch.dtype) -> None:
    for width, value_width, pos_width in ((8, 256, 64), (256, 8, 8), (40, 72, 200)):
        check(make_case(1, (70,), heads=1, width=width, value_width=value_width, pos_width=pos_width, dtype=dtype), CPU)


@pytest.mark.parametrize("growth", [30.0, 80.0, 400.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_grow_from_tile_to_tile(isa: str, dtype: torch.dtype, growth: float) -> None:
    """A row's first reference stays until sums pass a limit: growth below it, beyond it, and beyond infinity."""
    case = make_case(q_lengths=(40,), k_lengths=(600,), width=16, pos_width=16, dtype=dtype)
    assert case.k is not None and case.q is not None
    case.q[:, :, 0] = 1.0
    case.k[:, :, 0] = (torch.linspace(-1, 1, 600) * 4 * growth).to(dtype)[:, None]
    check(case, CPU)


def test_large_scores_do_not_overflow(isa: str) -> None:
    """Scores near +-1e4 (the softmax is a hard maximum), and table entries of -inf as a user's own mask."""
    case = make_case(11, (65, 40), heads=2, width=32, mask="causal")
    check(replace(case, q=case.q * 300, k=case.k * 10), CPU)
    table = case.tables[0].clone()
    table[:, ::3] = -1e30
    check(replace(case, tables=(table,)), CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads_or_repetition(isa: str, dtype: torch.dtype) -> None:
    case = make_case(
        12, (129, 0, 65, 200), heads=4, key_heads=2, width=32, pos_width=32, terms=2, dropout_p=0.2, dtype=dtype
    )
    torch.set_num_threads(1)
    first = CPU(case)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert_same_bits(CPU(case), first)


def test_bits_do_not_depend_on_the_rest_of_the_batch(isa: str) -> None:
    """A sample gives the same out and lse alone and between others (without dropout, which knows its number)."""
    case = make_case(13, (70, 33), heads=2, width=32, terms=0, mask="causal", lse_gradient=False)
    both = CPU(case)
    layout = AttentionLayout.build(intervals.causal([33]), [33], [33])
    alone = CPU(replace(case, layout=layout, q=case.q[70:], k=case.k[70:], v=case.v[70:], dout=case.dout[70:]))
    for name in ("out", "lse"):
        torch.testing.assert_close(both[name][70:], alone[name], rtol=1e-6, atol=1e-6)


def test_dropout_masks_equal_the_reference(isa: str) -> None:
    """Values of one-hot rows show which probabilities were kept, pair by pair."""
    lengths = (21, 40)
    keys = sum(lengths)
    case = make_case(14, lengths, heads=3, width=64, value_width=64, terms=0, head_scale=False, mask="random")
    v = torch.eye(64)[:keys, None].expand(keys, 3, 64).contiguous()
    options = {"dropout_p": 0.5, "dropout_seed": torch.tensor([-(2**63), 2**63 - 1])}
    case = replace(case, v=v, options=options)
    got, want = CPU(case)["out"], oracle(case)["out"]
    assert torch.equal(got == 0, want == 0)


def test_disjoint_calls_merge_by_their_lse(isa: str) -> None:
    """Attention sinks, shared prefixes, split keys: two intervals are two calls, exact with gradients."""
    torch.manual_seed(0)
    n, cut = 70, 33
    q, k, v = (torch.randn(n, 2, 32, requires_grad=True) for _ in range(3))

    def part(lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
        visible = torch.tensor([[lo, hi]] * n, dtype=torch.int32)
        return attention(q, k, v, AttentionLayout.build(visible, [n], [n]), return_lse=True, backend="cpu")

    (out_a, lse_a), (out_b, lse_b) = part(0, cut), part(cut, n)
    lse = torch.logaddexp(lse_a, lse_b)
    merged = out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None]
    whole, whole_lse = part(0, n)
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(lse, whole_lse)
    weight = torch.randn_like(whole)
    for a, b in zip(
        torch.autograd.grad(merged, (q, k, v), weight), torch.autograd.grad(whole, (q, k, v), weight), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_queries_may_share_keys_across_samples(isa: str) -> None:
    """Beams: three samples of queries, one run of keys; dk and dv add up over them."""
    visible = torch.tensor([[0, 40]] * 6, dtype=torch.int32)
    layout = AttentionLayout.build(visible, [2, 2, 2], [40, 0, 0])
    case = make_case(15, (2, 2, 2), (40, 0, 0), heads=2, width=32, terms=0)
    shared: Case = replace(case, layout=layout).to(torch.float32)
    shared.k.normal_()
    shared.v.normal_()
    check(shared, CPU)


def test_head_scale_of_zero_has_its_gradient(isa: str) -> None:
    case = make_case(16, (40,), heads=2, width=32)
    check(replace(case, head_scale=torch.tensor([0.0, 1.5])), CPU)

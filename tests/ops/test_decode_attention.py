"""decode_attention: both kinds of cache against float64, on every instruction set, and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_attention_cases import DTYPES, SOURCES, TABLES, WIDTHS, Case, check, draw, spoil
from hypothesis import given, settings
from hypothesis import strategies as st
from short import SANITIZED, examples
from torch import Tensor

import ofakern
from ofakern.errors import BackendError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.ops.attention import AttentionLayout, attention
from ofakern.ops.attention.intervals import cross
from ofakern.ops.decode_attention import KeyValueCache, decode_attention
from ofakern.ops.decode_attention.reference import quantize_heads
from ofakern.ops.memory import large_empty

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SOURCES, ids=str)
def test_source(isa: str, sizes: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    check(draw(dtype, *sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", TABLES, ids=str)
def test_slots(isa: str, sizes: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    check(draw(dtype, *sizes, table=True))


@pytest.mark.parametrize("table", [False, True], ids=["source", "slots"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_widths(isa: str, widths: tuple[int, int], dtype: torch.dtype, table: bool) -> None:
    check(draw(dtype, [3, 2], [40, 70], table=table, heads=3, width=widths[0], value_width=widths[1], plain=True))


@settings(max_examples=examples(25), deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 19), st.integers(0, 70)), min_size=1, max_size=4),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_drawn_shapes(samples: list[tuple[int, int]], dtype: torch.dtype, table: bool) -> None:
    check(draw(dtype, [rows for rows, _ in samples], [count for _, count in samples], table=table, width=8))


@pytest.mark.parametrize("table", [False, True], ids=["source", "slots"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8(isa: str, dtype: torch.dtype, table: bool) -> None:
    """Exact for the rounded numbers, which are off by at most half a step."""
    case = draw(dtype, [3, 2], [70, 530 if not table else 150], table=table)
    (k, k_scale), (v, v_scale) = quantize_heads(case.k), quantize_heads(case.v)
    wide_k, wide_v = k.double() * k_scale[..., None], v.double() * v_scale[..., None]
    assert ((wide_v - case.v.double()).abs() <= case.v.double().abs().amax(2, True) / 253).all()
    check(case, case.cache(int8=True), wide_k, wide_v)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("int8", [False, True])
def test_a_cache_shows_what_it_holds(backend: str, int8: bool) -> None:
    case = draw(torch.bfloat16, [2, 1, 1], [33, 0, 70], width=24, value_width=40)
    cache = case.cache(int8, backend)
    k, v, first = cache.natural()
    assert cache.slots == 103 and first is not None and first.tolist() == [0, 33, 33]
    limit = 1 / 253 if int8 else 0.0
    for have, want in ((k, case.k), (v, case.v)):
        assert ((have.float() - want.float()).abs() <= limit * want.float().abs().amax(2, True) + 1e-6).all()


def test_source_agrees_with_attention() -> None:
    """Beams against stored keys are attention's rows of one interval."""
    case = draw(torch.float32, [5, 2], [40, 70], plain=True)
    rows, counts = case.row_offsets.diff().tolist(), case.counts.tolist()
    layout = AttentionLayout.build(cross(rows, counts), rows, counts)
    want, want_lse = attention(case.q, case.k, case.v, layout, return_lse=True)
    out, lse = decode_attention(case.q, case.cache(), case.row_offsets, return_lse=True)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse, want_lse, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beams_find_their_past_where_it_was_written(dtype: torch.dtype) -> None:
    """A search of random reorderings: the table moves, the cache never; a moved cache is the oracle."""
    g = torch.Generator().manual_seed(1)
    beams, steps, heads, width = 4, 12, 2, 8
    cache = KeyValueCache.empty(beams, heads, width, dtype=dtype)
    spoil(cache)
    table = torch.zeros((beams, steps), dtype=torch.int32)
    moved: list[tuple[Tensor, Tensor]] = [(torch.empty(0, heads, width), torch.empty(0, heads, width))] * beams
    rows = torch.tensor([0, beams], dtype=torch.int32)
    for step in range(steps):
        cache = cache.grown((step + 1) * beams)
        k, v, q = (torch.randn((beams, heads, width), generator=g).to(dtype) for _ in range(3))
        slots = torch.arange(step * beams, (step + 1) * beams, dtype=torch.int32)
        cache.write(slots, k, v)
        table[:, step] = slots
        moved = [(torch.cat([a, k[r : r + 1]]), torch.cat([b, v[r : r + 1]])) for r, (a, b) in enumerate(moved)]
        got = decode_attention(q, cache, rows, slots=table, counts=torch.tensor([step + 1], dtype=torch.int32))
        for r, (keys, values) in enumerate(moved):
            one = KeyValueCache.of_source(keys.to(dtype), values.to(dtype), [step + 1])
            want = decode_attention(q[r : r + 1], one, torch.tensor([0, 1], dtype=torch.int32))
            assert isinstance(got, Tensor) and isinstance(want, Tensor)
            limit = 1e-6 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(got[r : r + 1], want, atol=limit, rtol=limit)
        parents = torch.randint(0, beams, (beams,), generator=g)
        table = table[parents]
        moved = [moved[int(p)] for p in parents]


def test_selected_and_joined_sources() -> None:
    for int8, backend in ((False, "cpu"), (True, "cpu"), (False, "reference"), (True, "reference")):
        one, two = draw(torch.float32, [2, 1, 3], [40, 3, 70]), draw(torch.float32, [1, 2], [5, 33])
        joined = one.cache(int8, backend).select([2, 0]).joined(two.cache(int8, backend))
        assert joined.lengths.tolist() == [70, 40, 5, 33]
        k, v, first = joined.natural()
        assert first is not None
        for at, (case, lo, hi) in zip(
            first.tolist(), [(one, 43, 113), (one, 0, 40), (two, 0, 5), (two, 5, 38)], strict=True
        ):
            for have, want in ((k, case.k), (v, case.v)):
                assert (have[at : at + hi - lo] - want[lo:hi]).abs().max() <= (0.02 if int8 else 0)
        rows = torch.tensor([0, 1, 1, 3, 4], dtype=torch.int32)
        q = draw(torch.float32, [4], [1]).q
        got = decode_attention(q, joined, rows, backend=backend)
        want_out = decode_attention(q, joined, rows, backend="reference")
        torch.testing.assert_close(got, want_out, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("int8", "backend"), [(False, "cpu"), (True, "cpu"), (False, "reference")])
def test_newcomers_take_the_room_of_those_who_left(int8: bool, backend: str) -> None:
    """Continuous batching: storage stops growing, and everybody keeps what is theirs."""
    g = torch.Generator().manual_seed(3)
    cases = [draw(torch.float32, [1], [20 + 7 * n]) for n in range(12)]
    cache, present = cases[0].cache(int8, backend), [0]
    sizes = []
    for n in range(1, 12):
        if len(present) > 3:
            stay = sorted(torch.randperm(len(present), generator=g)[:3].tolist())
            cache, present = cache.select(stay), [present[s] for s in stay]
        cache, present = cache.joined(cases[n].cache(int8, backend)), [*present, n]
        sizes.append(cache.nbytes)
        k, v, first = cache.natural()
        assert cache.lengths.tolist() == [20 + 7 * p for p in present] and first is not None
        for p, at in zip(present, first.tolist(), strict=True):
            for have, want in ((k, cases[p].k), (v, cases[p].v)):
                assert (have[at : at + len(want)] - want).abs().max() <= (0.02 if int8 else 0)
    assert len(set(sizes)) < 6


@pytest.mark.parametrize("table", [False, True], ids=["source", "slots"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads_or_neighbours(dtype: torch.dtype, table: bool) -> None:
    case = draw(dtype, [3, 2], [600, 530], table=table)
    cache = case.cache()
    whole = decode_attention(case.q, cache, case.row_offsets, **case.options(), return_lse=True)
    torch.set_num_threads(3)
    for have, want in zip(
        decode_attention(case.q, cache, case.row_offsets, **case.options(), return_lse=True), whole, strict=True
    ):
        assert torch.equal(have, want)
    case.row_offsets, case.counts = torch.tensor([0, 2], dtype=torch.int32), case.counts[1:]
    case.q, case.bias = case.q[3:], case.bias[:, 600:] if case.bias is not None else None
    case.slots = None if case.slots is None else case.slots[3:]
    alone = decode_attention(
        case.q, cache if table else cache.select([1]), case.row_offsets, **case.options(), return_lse=True
    )
    assert torch.equal(alone[0], whole[0][3:]) and torch.equal(alone[1], whole[1][3:])


def test_results_over_separate_keys_merge_by_their_log_sums() -> None:
    case = draw(torch.float32, [3], [100], plain=True)
    rows = case.row_offsets
    whole = decode_attention(case.q, case.cache(), rows)
    parts = [KeyValueCache.of_source(case.k[lo:hi], case.v[lo:hi], [hi - lo]) for lo, hi in ((0, 37), (37, 100))]
    outs, sums = zip(*(decode_attention(case.q, part, rows, return_lse=True) for part in parts), strict=True)
    weights = torch.stack(sums).softmax(0)
    merged = (weights[..., None] * torch.stack(outs)).sum(0)
    torch.testing.assert_close(merged, whole, atol=2e-6, rtol=2e-6)


def test_scores_may_be_minus_infinity(isa: str) -> None:
    """A bias can hide keys: all of them gives a row without keys."""
    case = draw(torch.float32, [2], [600])
    assert case.bias is not None
    case.bias[0] = -torch.inf
    case.bias[1, :550] = -torch.inf
    check(case)
    out, lse = decode_attention(case.q, case.cache(), case.row_offsets, **case.options(), return_lse=True)
    assert not out[:, 0].any() and torch.isneginf(lse[:, 0]).all() and out[:, 1].all()


@pytest.mark.parametrize("table", [False, True], ids=["source", "slots"])
def test_large_scores_do_not_overflow(isa: str, table: bool) -> None:
    case = draw(torch.float32, [2], [300], table=table)
    case.q *= 1000
    check(case)


def test_views_and_empty_calls() -> None:
    case = draw(torch.bfloat16, [3, 2], [40, 9])
    cache = KeyValueCache.of_source(*(torch.cat([x, x], 2)[..., :16] for x in (case.k, case.v)), case.counts)
    want = decode_attention(case.q, case.cache(), case.row_offsets, **case.options())
    assert case.bias is not None
    wide = case.options() | {"bias": torch.cat([case.bias, case.bias], 1)[:, :49]}
    assert torch.equal(decode_attention(case.q, cache, case.row_offsets, **wide), want)  # type: ignore[arg-type]
    turned = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(decode_attention(turned, cache, case.row_offsets, **case.options()), want)  # type: ignore[arg-type]
    none = torch.zeros(3, dtype=torch.int32)
    assert decode_attention(case.q[:0], cache, none).shape == (0, 2, 16)  # type: ignore[union-attr]
    nothing = KeyValueCache.of_source(case.k[:0], case.v[:0], [])
    assert decode_attention(case.q[:0], nothing, none[:1]).shape == (0, 2, 16)  # type: ignore[union-attr]
    slots, counts = torch.zeros((0, 0), dtype=torch.int32), none[:0]
    empty = KeyValueCache.empty(0, 2, 16, dtype=torch.bfloat16)
    assert decode_attention(case.q[:0], empty, none[:1], slots=slots, counts=counts).shape == (0, 2, 16)  # type: ignore[union-attr]


@pytest.mark.parametrize("table", [False, True], ids=["source", "slots"])
def test_poisoned_outputs_are_all_written(cpu: Any, table: bool) -> None:
    case = draw(torch.float32, [3, 2], [600, 0], table=table)
    arguments = (*raw(case), 16, 0.2, 1)
    out, lse = torch.full((5, 2, 16), torch.nan), torch.full((5, 2), torch.nan)
    scratch = torch.full((cpu.decode_attention_workspace(*arguments),), 255, dtype=torch.uint8)
    cpu.decode_attention_forward(out, lse, scratch, *arguments)
    assert torch.isfinite(out).all() and not torch.isnan(lse).any() and not out[3:].any()
    with pytest.raises(OfakernValueError, match="workspace"):
        cpu.decode_attention_forward(out, lse, scratch[:64], *arguments)


def raw(case: Case) -> tuple[Tensor | None, ...]:
    cache = case.cache()
    counts = None if case.slots is None else case.counts
    tables = (case.row_offsets, cache.runs, case.slots, counts, case.bias, case.head_scale)
    return (case.q, cache.keys, cache.values, cache.key_scales, cache.value_scales, *tables)


@pytest.mark.parametrize("table", [False, True], ids=["source", "slots"])
def test_opcheck_compile_and_vmap(table: bool) -> None:
    case = draw(torch.float32, [3, 2], [40, 9], table=table)
    torch.library.opcheck(torch.ops.ofakern.decode_attention_fwd.default, (*raw(case), 16, 0.2))
    torch._dynamo.reset()
    cache = case.cache()

    def call(q: Tensor) -> Any:
        return decode_attention(q * 2, cache, case.row_offsets, **case.options(), return_lse=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for have, want in zip(compiled(case.q), call(case.q), strict=True):
        assert torch.equal(have, want)
    with pytest.raises(OfakernRuntimeError, match="under vmap"):
        torch.vmap(call)(case.q.expand(2, 5, 2, 16))


def test_autocast_takes_the_caches_dtype() -> None:
    case = draw(torch.bfloat16, [3], [40])
    want = decode_attention(case.q, case.cache(), case.row_offsets)
    with torch.autocast("cpu", torch.bfloat16):
        got = decode_attention(case.q.float(), case.cache(), case.row_offsets)
    assert torch.equal(got, want)  # type: ignore[arg-type]


def test_float64_and_gradients_are_the_references() -> None:
    case = draw(torch.float64, [2], [5], plain=True)
    q = case.q.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: decode_attention(q, case.cache(), case.row_offsets), q)


def test_explain_names_the_backend() -> None:
    case = draw(torch.float32, [2], [5])
    assert "runs on 'cpu'" in ofakern.explain("decode_attention", case.q, case.cache(), case.row_offsets)
    plain = case.cache(backend="reference")
    assert "made with backend='reference'" in ofakern.explain("decode_attention", case.q, plain, case.row_offsets)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


CASE = draw(torch.float32, [3, 2], [40, 9])
TABLE = draw(torch.float32, [3, 2], [4, 9], table=True)
REFUSED: list[tuple[str, type[Exception], Case, dict[str, Any]]] = [
    ("cache must be a KeyValueCache", OfakernTypeError, CASE, {"cache": 3}),
    ("q must be a tensor", OfakernTypeError, CASE, {"q": 3}),
    ("q must have shape \\[R,H=2,K=16\\]", OfakernValueError, CASE, {"q": torch.ones(5, 2, 8)}),
    ("q must have the cache's dtype", OfakernTypeError, CASE, {"q": CASE.q.half()}),
    ("q must not need a gradient", OfakernRuntimeError, CASE, {"q": CASE.q.clone().requires_grad_()}),
    ("row_offsets must be an int32", OfakernTypeError, CASE, {"row_offsets": CASE.row_offsets.long()}),
    ("row_offsets must have shape", OfakernValueError, CASE, {"row_offsets": integers()}),
    ("row_offsets must have one entry more", OfakernValueError, CASE, {"row_offsets": integers(0, 5)}),
    ("row_offsets must rise from 0 to R", OfakernValueError, CASE, {"row_offsets": integers(0, 3, 4)}),
    ("row_offsets must rise from 0 to R", OfakernValueError, CASE, {"row_offsets": integers(0, 6, 5)}),
    ("must be None with a source cache", OfakernValueError, CASE, {"counts": integers(1, 1)}),
    ("bias must have shape \\[H=2", OfakernValueError, CASE, {"bias": torch.ones(3, 49)}),
    ("bias must have shape \\[H, sum", OfakernValueError, CASE, {"bias": torch.ones(2, 48)}),
    ("bias must be a float32", OfakernTypeError, CASE, {"bias": torch.ones(2, 49, dtype=torch.int32)}),
    ("head_scale must have shape", OfakernValueError, CASE, {"head_scale": torch.ones(3)}),
    ("backend 'cuda' cannot run this call", BackendError, CASE, {"backend": "cuda"}),
    ("backend must be one of", OfakernValueError, CASE, {"backend": "gpu"}),
    ("made with backend='reference'", BackendError, CASE, {"cache": CASE.cache(backend="reference")}),
    ("slots and counts must be given", OfakernValueError, TABLE, {"slots": None}),
    ("slots must be an int32", OfakernTypeError, TABLE, {"slots": torch.zeros(5, 9)}),
    ("slots must have shape \\[R=5,T\\]", OfakernValueError, TABLE, {"slots": torch.zeros(4, 9, dtype=torch.int32)}),
    ("counts must have shape \\[B=2\\]", OfakernValueError, TABLE, {"counts": integers(1)}),
    ("counts\\[1\\] must be in 0..T \\(11\\)", OfakernValueError, TABLE, {"counts": integers(4, 12), "bias": None}),
    ("slots\\[0\\] must name slots", OfakernValueError, TABLE, {"slots": torch.full((5, 9), 99, dtype=torch.int32)}),
    ("slots\\[0\\] must name slots", OfakernValueError, TABLE, {"slots": torch.full((5, 9), -1, dtype=torch.int32)}),
]


@pytest.mark.parametrize(("message", "error", "case", "changes"), REFUSED)
def test_refusals(message: str, error: type[Exception], case: Case, changes: dict[str, Any]) -> None:
    base = {"q": case.q, "cache": case.cache(), "row_offsets": case.row_offsets} | case.options()
    with pytest.raises(error, match=message):
        decode_attention(**(base | changes))


K = torch.ones(6, 2, 4)
REFUSED_CACHES: list[tuple[str, type[Exception], Callable[[], Any]]] = [
    ("slots must be at least 0", OfakernValueError, lambda: KeyValueCache.empty(-1, 2, 8)),
    ("widths in 1..256", OfakernValueError, lambda: KeyValueCache.empty(4, 2, 257)),
    ("dtype must be a float dtype", OfakernTypeError, lambda: KeyValueCache.empty(4, 2, 8, dtype=torch.int32)),
    ("k must be a tensor", OfakernTypeError, lambda: KeyValueCache.of_source(3, K, [6])),  # type: ignore[arg-type]
    ("k must have a float dtype", OfakernTypeError, lambda: KeyValueCache.of_source(K.int(), K, [6])),
    ("v must have shape", OfakernValueError, lambda: KeyValueCache.of_source(K, K[0], [6])),
    ("v must have k's dtype", OfakernTypeError, lambda: KeyValueCache.of_source(K, K.half(), [6])),
    ("v must have k's tokens", OfakernValueError, lambda: KeyValueCache.of_source(K, K[:5], [6])),
    ("lengths must be non-negative", OfakernValueError, lambda: KeyValueCache.of_source(K, K, [3, 2])),
    ("write: a source cache", OfakernValueError, lambda: KeyValueCache.of_source(K, K, [6]).write(integers(0), K, K)),
    ("grown: a source cache", OfakernValueError, lambda: KeyValueCache.of_source(K, K, [6]).grown(9)),
    (
        "slots, k and v must have shapes",
        OfakernValueError,
        lambda: KeyValueCache.empty(9, 2, 4).write(integers(0), K, K),
    ),
    ("cache must be of a source", OfakernValueError, lambda: KeyValueCache.empty(9, 2, 4).select([0])),
    (
        "other must be of the same kind",
        OfakernValueError,
        lambda: KeyValueCache.of_source(K, K, [6]).joined(KeyValueCache.of_source(K, K, [6], backend="reference")),
    ),
]


@pytest.mark.parametrize(("message", "error", "make"), REFUSED_CACHES)
def test_refused_caches(message: str, error: type[Exception], make: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        make()


def test_large_memory_is_whole_and_given_back(cpu: Any) -> None:
    """Of the shape and dtype asked for, aligned to a large page, kept by its views and freed with the last of them."""
    waited = cpu.keep_memory_for(0.0)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4 >> 10

    before = resident()
    whole = large_empty((3, 5 << 20), torch.bfloat16)
    part = whole.fill_(2)[2:]
    assert whole.shape == (3, 5 << 20) and whole.data_ptr() % (2 << 20) == 0
    assert SANITIZED or resident() - before > 25
    del whole
    assert (part == 2).all() and (SANITIZED or resident() - before > 25)
    del part
    assert SANITIZED or resident() - before < 5
    cpu.keep_memory_for(waited)
    assert large_empty((3, 0), torch.float32).shape == (3, 0)

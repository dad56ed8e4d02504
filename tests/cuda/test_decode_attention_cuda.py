"""decode_attention in CUDA C++: the cases and the rule of the CPU kernels, on an emulated GPU and on a real one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_attention_cases import DTYPES, SOURCES, TABLES, WIDTHS, Case, check, draw, spoil
from torch import Tensor

from ofakern.errors import BackendError, OfakernTypeError, OfakernValueError
from ofakern.ops import native
from ofakern.ops.decode_attention import KeyValueCache, decode_attention
from ofakern.ops.decode_attention.reference import quantize_heads

BEAMS = 1024  # keys of a block of the kernel for all beams


def on(device: torch.device, case: Case) -> Case:
    """The case's numbers on the device; tables stay on the CPU, from where they are copied."""
    parts = {name: getattr(case, name) for name in ("q", "k", "v", "bias", "head_scale")}
    return replace(case, backend="cuda", **{name: None if x is None else x.to(device) for name, x in parts.items()})


def run(case: Case, cache: KeyValueCache | None = None, **options: Any) -> Any:
    cache = case.cache() if cache is None else cache
    given = case.options() | options
    return decode_attention(case.q, cache, case.row_offsets, **given, return_lse=True, backend="cuda")


def shuffled(device: torch.device, seed: int) -> None:
    if device.type == "cpu":
        native.cuda_kernels.set_seed(seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SOURCES, ids=str)
def test_source(cuda_device: torch.device, sizes: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    check(on(cuda_device, draw(dtype, *sizes)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", TABLES, ids=str)
def test_slots(cuda_device: torch.device, sizes: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    check(on(cuda_device, draw(dtype, *sizes, table=True)))


@pytest.mark.parametrize("table", [False, True], ids=["source", "slots"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [*WIDTHS, (128, 72), (256, 256)], ids=str)
def test_widths(cuda_device: torch.device, widths: tuple[int, int], dtype: torch.dtype, table: bool) -> None:
    """(64, 64) and (128, 128): tensor cores, padded from (24, 40) and (80, 128); (1, 3): nothing is aligned."""
    wide = draw(dtype, [3, 2], [40, 70], table=table, heads=3, width=widths[0], value_width=widths[1], plain=True)
    check(on(cuda_device, wide))


@pytest.mark.parametrize("table", [False, True], ids=["source", "slots"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 128])
def test_int8(cuda_device: torch.device, dtype: torch.dtype, table: bool, width: int) -> None:
    """Exact for the rounded numbers."""
    sizes = [70, 150 if table or width == 128 else 1100]
    case = draw(dtype, [3, 2], sizes, table=table, width=width, value_width=width)
    (k, k_scale), (v, v_scale) = quantize_heads(case.k), quantize_heads(case.v)
    case = on(cuda_device, case)
    check(case, case.cache(int8=True), k.double() * k_scale[..., None], v.double() * v_scale[..., None])


@pytest.mark.parametrize("scale", [1e-4, 300.0])
def test_int8_of_small_and_large_numbers(cuda_device: torch.device, scale: float) -> None:
    """Values' scales do not leave float16's range: they are part of the weights' exponents."""
    case = draw(torch.float16, [4], [90], width=64, value_width=64, plain=True)
    case.v = (case.v.float() * scale).half()
    (k, k_scale), (v, v_scale) = quantize_heads(case.k), quantize_heads(case.v)
    case = on(cuda_device, case)
    check(case, case.cache(int8=True), k.double() * k_scale[..., None], v.double() * v_scale[..., None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_may_be_minus_infinity(cuda_device: torch.device, dtype: torch.dtype) -> None:
    case = draw(dtype, [2], [1100])
    assert case.bias is not None
    case.bias[0] = -torch.inf
    case.bias[1, :1050] = -torch.inf
    case = on(cuda_device, case)
    check(case)
    out, lse = run(case)
    assert not out[:, 0].any() and torch.isneginf(lse[:, 0]).all() and out[:, 1].all()


@pytest.mark.parametrize("table", [False, True], ids=["source", "slots"])
def test_large_scores_do_not_overflow(cuda_device: torch.device, table: bool) -> None:
    case = draw(torch.float32, [2], [300], table=table)
    case.q *= 1000
    check(on(cuda_device, case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_no_table_names_is_not_read(cuda_device: torch.device, dtype: torch.dtype) -> None:
    """Keys beside a source's runs, and the padding of its tiles, hold NaN."""
    case = on(cuda_device, draw(dtype, [3], [37], plain=True))
    want = run(case)
    cache = case.cache()
    k, v = (torch.full((60, 2, 16), torch.nan, dtype=dtype, device=cuda_device) for _ in range(2))
    k[11:48], v[11:48] = case.k, case.v
    moved = replace(cache, keys=k, values=v, runs=torch.tensor([[11, 37]], dtype=torch.int32))
    for have, same in zip(run(case, moved), want, strict=True):
        assert torch.equal(have, same)


@pytest.mark.parametrize("table", [False, True], ids=["source", "slots"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_nothing_but_the_sample(cuda_device: torch.device, dtype: torch.dtype, table: bool) -> None:
    case = on(cuda_device, draw(dtype, [3, 2], [300, 1100 if not table else 290], table=table))
    cache = case.cache()
    whole = run(case, cache)
    for seed in (1, 2):
        shuffled(cuda_device, seed)
        assert all(torch.equal(have, want) for have, want in zip(run(case, cache), whole, strict=True))
    alone = replace(
        case,
        q=case.q[3:],
        bias=None if case.bias is None else case.bias[:, 300:],
        slots=None if case.slots is None else case.slots[3:, :290],
        row_offsets=torch.tensor([0, 2], dtype=torch.int32),
        counts=case.counts[1:],
    )
    for have, want in zip(run(alone, cache if table else cache.select([1])), whole, strict=True):
        assert torch.equal(have, want[3:])


def test_selected_joined_and_grown_caches(cuda_device: torch.device) -> None:
    """Continuous batching on the device: the same answers as from caches made at once."""
    for dtype, int8 in ((torch.bfloat16, False), (torch.float32, True)):
        one, two = (on(cuda_device, draw(dtype, rows, counts, plain=True)) for rows, counts in
                    (([2, 1, 3], [40, 3, 70]), ([1, 2], [5, 33])))  # fmt: skip
        joined = one.cache(int8).select([2, 0]).joined(two.cache(int8))
        assert joined.lengths.tolist() == [70, 40, 5, 33] and joined.longest == 70
        q, rows = torch.cat([one.q, two.q])[:4], torch.tensor([0, 1, 1, 3, 4], dtype=torch.int32)
        got = decode_attention(q, joined, rows, backend="cuda")
        want = decode_attention(q, joined, rows, backend="reference")
        limit = 2e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got, want, atol=limit, rtol=limit)
    cache = KeyValueCache.empty(3, 2, 8, device=cuda_device)
    spoil(cache)
    k, v = (torch.randn(3, 2, 8, device=cuda_device) for _ in range(2))
    cache.write(torch.tensor([2, 0, 1], dtype=torch.int32), k, v)
    cache = cache.grown(7)
    cache.write(torch.tensor([6], device=cuda_device), k[:1], v[:1])
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    rows, counts = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    got = decode_attention(k[:1], cache, rows, slots=table, counts=counts, backend="cuda")
    want = decode_attention(k[:1], cache, rows, slots=table, counts=counts, backend="reference")
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("table", [False, True], ids=["source", "slots"])
def test_poisoned_outputs_are_all_written(cuda_device: torch.device, table: bool) -> None:
    case = on(cuda_device, draw(torch.float32, [3, 2], [600, 0], table=table))
    arguments = (*raw(case), 16, 0.2, 600)
    kernels = native.cuda_kernels
    out, lse = (torch.full(shape, torch.nan, device=cuda_device) for shape in ((5, 2, 16), (5, 2)))
    needed = kernels.decode_attention_workspace(*arguments)
    scratch = torch.full((needed,), 255, dtype=torch.uint8, device=cuda_device)
    kernels.decode_attention_forward(out, lse, scratch, *arguments)
    assert torch.isfinite(out).all() and not torch.isnan(lse).any() and not out[3:].any()
    with pytest.raises(OfakernValueError, match="workspace"):
        kernels.decode_attention_forward(out, lse, scratch[: needed - 64], *arguments)
    with pytest.raises(OfakernTypeError, match="out must be float32"):
        kernels.decode_attention_forward(out.half(), lse, scratch, *arguments)


def raw(case: Case) -> tuple[Tensor | None, ...]:
    cache = case.cache()
    counts = None if case.slots is None else case.counts
    runs = None if cache.runs is None else cache.device_runs
    tables = (case.row_offsets, runs, case.slots, counts)
    moved = (None if x is None else x.to(case.q.device) for x in tables)
    return (case.q, cache.keys, cache.values, cache.key_scales, cache.value_scales, *moved, case.bias, case.head_scale)


def test_tables_that_lie_are_not_followed(cuda_device: torch.device) -> None:
    """The host does not see what stands in them; the emulator's guards and a GPU's memory checker do."""

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=cuda_device)

    case = on(cuda_device, draw(torch.bfloat16, [3, 2], [40, 9]))
    q, k, v, *_ = raw(case)
    call = torch.ops.ofakern.decode_attention_fwd
    for offsets in (integers(0, 3, 5), integers(-4, 3, 99), integers(5, 2, 1)):
        for runs in (integers(-1, 9, 3, 999), integers(60, 1, 48, -1), integers(0, 40, 2**31 - 1, 2**31 - 1)):
            call(q, k, v, None, None, offsets, runs.view(2, 2), None, None, case.bias, None, 16, 0.2, 40)
        for slots, counts in ((-1, (3, 7)), (99, (4, 4)), (2**31 - 1, (-3, 2**31 - 1))):
            table = torch.full((5, 6), slots, dtype=torch.int32, device=cuda_device)
            out, lse = call(q, k, v, None, None, offsets, None, table, integers(*counts), case.bias, None, 16, 0.2)
            assert not out.any() and torch.isneginf(lse).all()  # keys that are not there are none


def test_views_and_empty_calls(cuda_device: torch.device) -> None:
    case = on(cuda_device, draw(torch.bfloat16, [3, 2], [40, 9]))
    assert case.bias is not None
    want = run(case)
    turned = replace(case, q=case.q.transpose(1, 2).contiguous().transpose(1, 2))
    wide = run(turned, bias=torch.cat([case.bias, case.bias], 1)[:, :49])
    assert all(torch.equal(have, same) for have, same in zip(wide, want, strict=True))
    none = torch.zeros(3, dtype=torch.int32)
    assert decode_attention(case.q[:0], case.cache(), none, backend="cuda").shape == (0, 2, 16)
    nothing = KeyValueCache.of_source(case.k[:0], case.v[:0], [], backend="cuda")
    assert decode_attention(case.q[:0], nothing, none[:1], backend="cuda").shape == (0, 2, 16)
    unaligned = torch.zeros(case.q.numel() + 1, dtype=case.q.dtype, device=cuda_device)[1:].view(case.q.shape)
    unaligned.copy_(case.q)  # another kernel takes it
    for have, same in zip(run(replace(case, q=unaligned)), want, strict=True):
        torch.testing.assert_close(have, same, atol=2e-2, rtol=2e-2)


def test_opcheck_and_compile(cuda_device: torch.device) -> None:
    case = on(cuda_device, draw(torch.float32, [3, 2], [40, 9], table=True))
    torch.library.opcheck(torch.ops.ofakern.decode_attention_fwd.default, (*raw(case), 16, 0.2))
    torch._dynamo.reset()
    cache = case.cache()

    def call(q: Tensor) -> Any:
        return decode_attention(q * 2, cache, case.row_offsets, **case.options(), return_lse=True, backend="cuda")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for have, want in zip(compiled(case.q), call(case.q), strict=True):
        assert torch.equal(have, want)


def test_refusals(cuda_device: torch.device) -> None:
    case = on(cuda_device, draw(torch.float32, [3, 2], [40, 9]))
    with pytest.raises(OfakernTypeError, match="row_offsets must be an int32 tensor"):
        run(replace(case, row_offsets=case.row_offsets.long()))
    with pytest.raises(OfakernValueError, match="bias must have shape"):
        run(case, bias=torch.ones(3, 49, device=cuda_device))
    double = on(cuda_device, draw(torch.float64, [3, 2], [40, 9]))
    with pytest.raises(BackendError, match="takes float32, bfloat16 and float16, got torch.float64"):
        run(double, KeyValueCache.of_source(double.k, double.v, double.counts, backend="reference"))
    if cuda_device.type == "cpu":
        packed = KeyValueCache.of_source(case.k, case.v, case.counts, backend="cpu")
        with pytest.raises(BackendError, match="made with backend='cpu'"):
            run(case, packed)
